"""Every command of the project; each session sets up its own environment.

`nox -s qualify` does the main job, `nox -s tests` runs the unit tests. Arguments after `--` go to the tool:
`nox -s conformance -- --target eager:dtype=bfloat16`, `nox -s perf -- --tp 1,2`.
"""

from __future__ import annotations

import os
from pathlib import Path

import nox

nox.needs_version = ">=2024.3.2"
nox.options.reuse_venv = "yes"
nox.options.sessions = ["lint", "types", "imports", "tests"]

ROOT = Path(__file__).parent
CONSTRAINTS = ROOT / "constraints.txt"
RESULTS = "results"
# pip would compile every module of torch, for a minute; of what is imported Python keeps bytecode by itself.
PLAIN = ["--no-compile", "-c", str(CONSTRAINTS)]

# transformers decides tokenizers and huggingface-hub, so the three are pinned together.
TRANSFORMERS = {
    "5.23.0": ["transformers==5.23.0", "tokenizers==0.23.3", "huggingface-hub==2.4.0"],
    "4.46.3": ["transformers==4.46.3", "tokenizers==0.20.3", "huggingface-hub==0.36.2"],
    "4.45.2": ["transformers==4.45.2", "tokenizers==0.20.3", "huggingface-hub==0.36.2"],
}
CURRENT = "5.23.0"
# The last documented version with TensorFlow classes, what they run on, and the numpy that this was built for.
TENSORFLOW = ["tensorflow-cpu==2.18.1", "tf-keras==2.18.0", "numpy==2.0.2", *TRANSFORMERS["4.46.3"]]
# The vendor's wheel is installed without what it asks for, which are builds of an index of its own (torch +cpu); these
# are the versions that it asks for. It wants torchvision as well, which only fits a torch of the same index; without it
# the pinned transformers has no image processor, and the target does not declare `preprocess`.
OPTIMUM_RBLN = ["optimum-rbln==0.12.0"]
OPTIMUM_RBLN_NEEDS = [
    "transformers==5.15.1",
    "tokenizers==0.22.1",
    "huggingface-hub==1.33.0",
    "diffusers==0.38.0",
    "accelerate==1.15.0",
]
# The documented version of each family, which makes its goldens.
GOLD = {"idefics": "4.46.3", "idefics3": "4.46.3", "mllama": "4.45.2"}
VERSIONS = [nox.param(version, id=version) for version in TRANSFORMERS]

# The embedded default; the same in the other dtypes that are judged on a CPU, and with attention spelled out.
DEFAULT_TARGET = ["--target", "eager"]
EVERY_VARIANT = [
    *DEFAULT_TARGET,
    *("--target", "eager:attention=eager"),
    *("--target", "eager:dtype=bfloat16"),
    *("--target", "eager:dtype=float64"),
]
# Two that have both attentions and the dtypes of most devices between them.
TWO_VARIANTS = [*DEFAULT_TARGET, "--target", "eager:dtype=bfloat16,attention=eager"]
# Targets that run compiled functions of fixed shapes, and the extra that installs each.
GRAPHS = {"openvino": "openvino", "onnxruntime": "onnx"}
# Bytecode is kept even where the environment says otherwise: a session starts up to several hundred processes of ours.
OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": ""}
ONE_THREAD = {"OMP_NUM_THREADS": "1"}


def install(session: nox.Session, extras: str, *more: str, transformers: str = CURRENT) -> None:
    """Install this checkout, editable, with extras, pinned."""
    pins = TRANSFORMERS[transformers] if "impl" in extras else []
    # torch first: the CPU build is found under its exact version only.
    if "impl" in extras:
        session.install(*PLAIN, "torch==2.13.0")
    session.install(*PLAIN, "-e", f".[{extras}]", *pins, *more)


def vlmqual(session: nox.Session, *arguments: str, success: tuple[int, ...] = (0,)) -> None:
    """Run the console script in the session's environment."""
    session.run("vlmqual", *arguments, success_codes=list(success), env=OFFLINE)


def with_default(arguments: list[str], option: str, default: list[str]) -> list[str]:
    """The user's arguments, with a default for an option that they leave out."""
    given = any(item == option or item.startswith(f"{option}=") for item in arguments)
    return arguments if given else [*default, *arguments]


def value_of(arguments: list[str], option: str) -> str:
    """What an option that is there says, as `--option value` or `--option=value`."""
    for item, following in zip(arguments, [*arguments[1:], ""], strict=True):
        if item == option:
            return following
        if item.startswith(f"{option}="):
            return item.removeprefix(f"{option}=")
    raise ValueError(f"{option} is not given")


def executors(extras: str, arguments: list[str]) -> str:
    """The extras, with those of the executors that the arguments name as targets."""
    named = [
        extra
        for kind, extra in GRAPHS.items()
        if any(item.startswith((kind, f"--target={kind}")) for item in arguments)
    ]
    return ",".join([extras, *named])


@nox.session
def tests(session: nox.Session) -> None:
    """Unit tests of all packages."""
    extras = ",".join(["impl,conformance,perf,signing,reports", *GRAPHS.values()])
    install(session, extras, "hypothesis", "pytest-xdist")
    # One compute thread for each process, and one process more than cores: some tests wait for others' processes.
    # Neighbours stay together: what they share is made once.
    many = ["-n", str((os.cpu_count() or 1) + 1), "--dist", "worksteal"]
    session.run("pytest", *many, *session.posargs, env={**OFFLINE, "OMP_NUM_THREADS": "1"})


@nox.session
def qualify(session: nox.Session) -> None:
    """The main job: conformance in every dtype and attention, performance and report of the embedded default target.

    `--short` has two variants, the default and bfloat16 with attention spelled out, and the smoke scenarios.
    """
    install(session, "impl,conformance,perf,reports")
    short = "--short" in session.posargs
    if unknown := [item for item in session.posargs if item != "--short"]:
        session.error(f"qualify knows --short only, not {' '.join(unknown)}; see conformance, perf and report")
    results = f"{RESULTS}/qualify"
    # A failed verdict or cell (1) belongs on the page, so the report is made before the session fails.
    variants = TWO_VARIANTS if short else EVERY_VARIANT
    jobs = ["--jobs", str(os.cpu_count() or 1)]  # a session and its target take turns, so each needs one core
    vlmqual(session, "conformance", *variants, *jobs, "--results", results, success=(0, 1))
    suite = ["--suite", "smoke"] if short else ["--suite", "default"]
    vlmqual(session, "perf", "--tp", "1,2", *suite, "--results", results, success=(0, 1))
    vlmqual(session, "report", results)


@nox.session
def conformance(session: nox.Session) -> None:
    """Conformance of one or several targets; the embedded default without arguments."""
    install(session, executors("impl,conformance", session.posargs))
    arguments = with_default(session.posargs, "--target", DEFAULT_TARGET)
    vlmqual(session, "conformance", *with_default(arguments, "--results", ["--results", RESULTS]))


@nox.session
@nox.parametrize("target", [nox.param(target, id=target) for target in GRAPHS])
def conformance_graphs(session: nox.Session, target: str) -> None:
    """Conformance of all families as compiled functions of fixed shapes; what was compiled is kept for the next run."""
    install(session, f"impl,conformance,{GRAPHS[target]}")
    arguments = with_default(session.posargs, "--target", ["--target", target])
    results = f"{RESULTS}/{target}"
    vlmqual(session, "conformance", *with_default(arguments, "--results", ["--results", results]))


@nox.session
@nox.parametrize("transformers", VERSIONS)
def conformance_transformers(session: nox.Session, transformers: str) -> None:
    """Conformance of a version of transformers, in an environment of its own."""
    install(session, "impl,conformance", transformers=transformers)
    arguments = with_default(session.posargs, "--target", ["--target", "transformers"])
    results = f"{RESULTS}/transformers-{transformers}"
    vlmqual(session, "conformance", *with_default(arguments, "--results", ["--results", results]))


@nox.session
def conformance_tf(session: nox.Session) -> None:
    """Conformance of the TensorFlow classes of Idefics, and the unit tests of the adapter over them."""
    constraints = Path(session.create_tmp()) / "constraints.txt"
    lines = CONSTRAINTS.read_text("utf-8").splitlines()
    constraints.write_text("\n".join(line for line in lines if not line.startswith("numpy==")), "utf-8")
    session.install("-c", str(constraints), "-e", ".[conformance,tensorflow]", *TENSORFLOW)
    session.run("pytest", "impl/tests/test_transformers_tf.py", env=OFFLINE)
    arguments = with_default(session.posargs, "--target", ["--target", "transformers-tf"])
    arguments = with_default(arguments, "--family", ["--family", "idefics"])
    results = f"{RESULTS}/transformers-tf"
    vlmqual(session, "conformance", *with_default(arguments, "--results", ["--results", results]))


@nox.session
def conformance_rbln(session: nox.Session) -> None:
    """Conformance of the bundled implementation over the emulator of RBLN's SDK.

    Where there is an NPU: `-- --target rbln:dtype=bfloat16`, with rebel-compiler in the environment.
    """
    install(session, "impl,conformance")
    arguments = with_default(session.posargs, "--target", ["--target", "rbln:emulate=1"])
    results = f"{RESULTS}/rbln"
    vlmqual(session, "conformance", *with_default(arguments, "--results", ["--results", results]))


@nox.session
def conformance_optimum_rbln(session: nox.Session) -> None:
    """Conformance of the vendor's optimum-rbln over the emulator of its SDK, and the unit tests of both.

    Where there is an NPU: `-- --target optimum-rbln:npu=RBLN-CA25`, with rebel-compiler in the environment.
    """
    session.install(*PLAIN, "torch==2.13.0")
    session.install(*PLAIN, "-e", ".[impl,conformance]", *OPTIMUM_RBLN_NEEDS)
    session.install("--no-deps", *OPTIMUM_RBLN)
    session.run(
        "pytest", "impl/tests/test_rebel_optimum.py", "impl/tests/test_optimum_rbln.py", env={**OFFLINE, **ONE_THREAD}
    )
    arguments = with_default(session.posargs, "--target", ["--target", "optimum-rbln:emulate=1"])
    arguments = with_default(arguments, "--family", ["--family", "idefics3"])
    results = f"{RESULTS}/optimum-rbln"
    vlmqual(session, "conformance", *with_default(arguments, "--results", ["--results", results]))


@nox.session
def proof(session: nox.Session) -> None:
    """What the suite is worth: implementations that are wrong on purpose, and honest ones.

    Every fault against what it declares and the core; `-- --full` every fault against the whole suite and in every
    profile, which goes on where it was left off; `-- --family mllama` one family.
    """
    install(session, "impl,conformance")
    vlmqual(session, "proof", *session.posargs)


@nox.session
def mutants(session: nox.Session) -> None:
    """What the suite is worth against changes that nobody thought of: 200 of each family, drawn by seed.

    `-- --family mllama --seed 2` others of one family; the same command goes on where it was left off.
    """
    install(session, "impl,conformance")
    vlmqual(session, "mutants", *session.posargs)


@nox.session
def perf(session: nox.Session) -> None:
    """Performance of one or several targets; the embedded default without arguments. Ends with the page.

    `-- --suite smoke` is short; `-- --dry-run` only tells what would be measured.
    """
    install(session, executors("impl,perf,reports", session.posargs))
    arguments = with_default(session.posargs, "--results", ["--results", RESULTS])
    if {"--dry-run", "--self-check"} & set(arguments):
        vlmqual(session, "perf", *arguments)
        return
    # A failed cell (1) belongs on the page, so the report is made before the session fails.
    vlmqual(session, "perf", *arguments, success=(0, 1))
    vlmqual(session, "report", value_of(arguments, "--results"))


@nox.session
def report(session: nox.Session) -> None:
    """One HTML and one Markdown page from results; folders after `--`, `results` without.

    The page is written in any case; the session fails when a verdict failed or a run is incomplete.
    """
    install(session, "conformance,reports")
    folders = session.posargs or [RESULTS]
    vlmqual(session, "report", *folders)


@nox.session
@nox.parametrize("transformers", VERSIONS)
def goldens(session: nox.Session, transformers: str) -> None:
    """Make goldens and fingerprints again from the pinned references; `-- --check` compares with what is stored.

    A family's documented version makes all of its goldens; the current one those pixels and prompts that the documented
    version refuses or misreads.
    """
    install(session, "impl", transformers=transformers)
    for family, documented in GOLD.items():
        if transformers not in (documented, CURRENT):
            continue
        only = [] if transformers == documented else ["--pixels-only"]
        arguments = ["--family", family, "--output", "fixtures", *only, *session.posargs]
        session.run("python", "-m", "vlmqual_adapters.goldens", *arguments, env=OFFLINE)
        if transformers == documented:
            session.run("python", "-m", "vlmqual_adapters.fingerprints", *arguments, env=OFFLINE)


@nox.session
def lint(session: nox.Session) -> None:
    """Style and format."""
    session.install(*PLAIN, "ruff")
    session.run("ruff", "check", *session.posargs)
    session.run("ruff", "format", "--check")


@nox.session
def types(session: nox.Session) -> None:
    """Static types, strict."""
    install(session, "impl,conformance,perf,signing,reports", "mypy", "pandas-stubs", "scipy-stubs", "types-psutil")
    session.run("mypy", *session.posargs)


@nox.session
def imports(session: nox.Session) -> None:
    """Who may import whom (the contracts stand in pyproject.toml)."""
    session.install(*PLAIN, "import-linter", "-e", ".")
    session.run("lint-imports", *session.posargs)


@nox.session
def build(session: nox.Session) -> None:
    """Wheel and source archive; then the wheel alone must find its fixtures and list its targets."""
    session.install(*PLAIN, "build", "twine")
    session.run("python", "-m", "build", "--outdir", "dist")
    session.run("twine", "check", "--strict", *[str(path) for path in sorted(Path("dist").glob("*"))])
    wheel = max(Path("dist").glob("*.whl"), key=os.path.getmtime).resolve()
    session.install(*PLAIN, "--force-reinstall", "--no-deps", str(wheel))
    session.install(*PLAIN, "numpy")
    session.chdir(session.create_tmp())
    code = "from vlmqual_contract import fixtures; print(*map(fixtures.file, fixtures.names()), sep='\\n')"
    session.run("python", "-c", code, silent=True)
    session.run("vlmqual", "targets")
