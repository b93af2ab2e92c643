"""Configuration of models that are compiled for RBLN's NPUs, as the documentation of optimum-rbln describes it.

What is left out is settled when a model is compiled. Options of the runtime (`device`, `create_runtimes`, `timeout`,
`activate_profiler`) are never saved.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Self

from vlmqual_impl.runtime.rebel_engine import GROUPS

CHUNK, CHUNK_CR, CHUNK_STEP = 128, 512, 64
_ATTENTION = ("eager",)


class RBLNModelConfig:
    """Base of the configurations of a model and of its parts.

    Attributes:
        submodules: names of the parts that have a configuration of their own.
        settings: keywords that change what is compiled.
        options: keywords of the runtime.
        given: the keywords that were given, None left out.
        batch_size: rows that are run at once.
        num_devices: devices that the part is divided over.
        device: number of a device, or a list of them; None for the first ones.
        npu: name of the NPU that is compiled for; None for the one that is here.
        create_runtimes: load what was compiled onto the devices.
        timeout: seconds that a call may take.
        activate_profiler: let the SDK take notes.
    """

    submodules: ClassVar[list[str]] = []
    settings: ClassVar[tuple[str, ...]] = ("batch_size", "npu", "num_devices")
    options: ClassVar[tuple[str, ...]] = ("device", "create_runtimes", "timeout", "activate_profiler")

    batch_size: int
    npu: str | None = None
    num_devices: int = 1
    device: int | list[int] | None = None
    create_runtimes: bool = True
    timeout: int | None = None
    activate_profiler: bool | None = None

    def __init__(self, batch_size: int | None = None, **kwargs: Any) -> None:
        """Take the settings of a part.

        Args:
            batch_size: rows that are run at once; 1 if it is None.
            **kwargs: the other settings and options of the class; `tensor_parallel_size` is another name of
                `num_devices`.

        Raises:
            ValueError: a keyword is not known, or a value is not valid.
        """
        known = [name for name in (*self.settings, *self.options) if name not in self.submodules]
        values = {"batch_size": batch_size, **kwargs}
        _take_alias(values)
        for name in values:
            if name not in known:
                kind = type(self).__name__
                raise ValueError(f"{kind} does not know {name!r}; it knows {', '.join((*known, *self.submodules))}")
        self.given: dict[str, Any] = {name: value for name, value in values.items() if value is not None}
        self.batch_size = 1
        for name, value in self.given.items():
            setattr(self, name, value)
        self._check()

    def _check(self) -> None:
        self._positive("batch_size")
        if not _is_number(self.num_devices) or self.num_devices not in GROUPS:
            valid = ", ".join(map(str, GROUPS))
            raise ValueError(f"num_devices is {self.num_devices!r}; a program is divided over {valid} devices")
        if self.npu is not None and not isinstance(self.npu, str):
            raise ValueError(f"npu is {self.npu!r}; it has to be a name such as 'RBLN-CA25'")
        for name in ("create_runtimes", "activate_profiler"):
            self._switch(name)
        if self.timeout is not None:
            self._positive("timeout")
        self._check_device()

    def _check_device(self) -> None:
        if self.device is not None and not _is_number(self.device):
            raise ValueError(f"device is {self.device!r}; it has to be the number of a device, from 0")
        if self.num_devices != 1:
            raise ValueError(f"num_devices is {self.num_devices}; only text_model can be divided over devices")

    def _positive(self, name: str) -> None:
        value = getattr(self, name)
        if not _is_number(value) or value < 1:
            raise ValueError(f"{name} is {value!r}; it has to be a positive whole number")

    def _switch(self, name: str) -> None:
        value = getattr(self, name)
        if value is not None and not isinstance(value, bool):
            raise ValueError(f"{name} is {value!r}; valid are True and False")

    @property
    def devices(self) -> list[int]:
        """Devices that were named; empty for the first ones."""
        if self.device is None:
            return []
        return list(self.device) if isinstance(self.device, (list, tuple)) else [self.device]

    @property
    def tensor_parallel_size(self) -> int:
        """Another name of `num_devices`."""
        return self.num_devices

    def changed(self, **changes: Any) -> Self:
        """The configuration with other keywords; None leaves what was given."""
        return type(self)(**(self.given | {name: value for name, value in changes.items() if value is not None}))

    def to_dict(self) -> dict[str, Any]:
        """What is saved: the settings, those of the parts as dictionaries."""
        found = {name: getattr(self, name) for name in self.settings}
        return {name: value.to_dict() if isinstance(value, RBLNModelConfig) else value for name, value in found.items()}

    def __repr__(self) -> str:
        found = {name: getattr(self, name) for name in (*self.settings, *self.options)}
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in found.items())})"


class RBLNVisionModelConfig(RBLNModelConfig):
    """The vision model, which takes one frame or image at a time.

    Attributes:
        image_size: height and width of what the processor gives, also given as one side; None for the model's.
    """

    settings = ("batch_size", "num_devices", "image_size")
    options = ("device",)

    image_size: list[int] | None = None

    def _check(self) -> None:
        super()._check()
        if self.batch_size != 1:
            raise ValueError(f"batch_size of vision_model is {self.batch_size}; frames run one at a time, 1 is valid")
        if self.image_size is None:
            return
        given: Any = self.image_size
        sides = list(given) if isinstance(given, (list, tuple)) else [given, given]
        if len(sides) != 2 or not all(_is_number(side) and side > 0 for side in sides):
            raise ValueError(f"image_size is {given!r}; it has to be a side's pixels, or [height, width]")
        self.image_size = sides


class RBLNTextModelConfig(RBLNModelConfig):
    """The language model.

    Attributes:
        max_seq_len: tokens that a sequence can have; None for the model's `max_position_embeddings`.
        prefill_chunk_size: tokens of a prompt that are run at once; None for 128, on RBLN-CR 512.
        decoder_batch_sizes: numbers of rows that functions are compiled for, falling from `batch_size`; None for that.
        use_inputs_embeds: True; the embedding always stays on the host.
        use_position_ids: taken, and without meaning here: positions are always passed along.
        use_attention_mask: likewise.
        attn_impl: "eager".
    """

    settings: ClassVar[tuple[str, ...]] = (
        "batch_size",
        "num_devices",
        "max_seq_len",
        "prefill_chunk_size",
        "decoder_batch_sizes",
        "use_inputs_embeds",
        "use_position_ids",
        "use_attention_mask",
        "attn_impl",
    )
    options = ("device",)

    max_seq_len: int | None = None
    prefill_chunk_size: int | None = None
    decoder_batch_sizes: list[int] | None = None
    use_inputs_embeds: bool = True
    use_position_ids: bool = False
    use_attention_mask: bool = False
    attn_impl: str = "eager"

    def _check(self) -> None:
        super()._check()
        for name in ("use_inputs_embeds", "use_position_ids", "use_attention_mask"):
            self._switch(name)
        if not self.use_inputs_embeds:
            raise ValueError("use_inputs_embeds is False; images are put between embeddings, only True is valid")
        if self.attn_impl not in _ATTENTION:
            raise ValueError(f"attn_impl is {self.attn_impl!r}; only {_ATTENTION[0]!r} is offered")
        if self.max_seq_len is not None:
            self._positive("max_seq_len")
        if self.prefill_chunk_size is not None:
            self._positive("prefill_chunk_size")
            if self.prefill_chunk_size % CHUNK_STEP:
                raise ValueError(
                    f"prefill_chunk_size is {self.prefill_chunk_size}; it has to be a multiple of {CHUNK_STEP}"
                )
        if self.decoder_batch_sizes is not None:
            sizes: Any = self.decoder_batch_sizes
            good = isinstance(sizes, (list, tuple)) and sizes and all(_is_number(one) and one > 0 for one in sizes)
            if not good or sorted(set(sizes), reverse=True) != list(sizes) or sizes[0] != self.batch_size:
                raise ValueError(
                    f"decoder_batch_sizes is {sizes!r}; it has to be a list of numbers of rows that falls from "
                    f"batch_size, here {self.batch_size}"
                )
            self.decoder_batch_sizes = list(sizes)

    def _check_device(self) -> None:
        given: Any = self.device
        devices = self.devices
        if not all(_is_number(one) for one in devices) or len(set(devices)) != len(devices) or given in ([], ()):
            raise ValueError(f"device is {given!r}; it has to be the number of a device, from 0, or a list of them")
        if devices and len(devices) != self.num_devices:
            raise ValueError(f"device is {given!r}; num_devices is {self.num_devices}, so many have to be named")


class RBLNCrossTextModelConfig(RBLNTextModelConfig):
    """A language model that looks at images from its layers.

    Attributes:
        image_slots: numbers of images of a row that functions are compiled for; [1] if left out. 0 is a text without
            images; rows with fewer images than a number have theirs padded.
    """

    settings = (*RBLNTextModelConfig.settings, "image_slots")

    image_slots: list[int]

    def _check(self) -> None:
        self.image_slots = self.given.get("image_slots", [1])
        super()._check()
        slots: Any = self.image_slots
        good = isinstance(slots, (list, tuple)) and slots and all(_is_number(one) for one in slots)
        if not good or len(set(slots)) != len(slots):
            raise ValueError(f"image_slots is {slots!r}; it has to be a list of different numbers of images")
        self.image_slots = sorted(slots)


class RBLNVisionLanguageModelConfig(RBLNModelConfig):
    """What the configurations of the three families share.

    Attributes:
        vision_model: of the vision model.
        text_model: of the language model.
    """

    submodules = ["vision_model", "text_model"]  # noqa: RUF012 - documented as a list
    settings = ("batch_size", "npu", "num_devices", "vision_model", "text_model")
    text_class: ClassVar[type[RBLNTextModelConfig]] = RBLNCrossTextModelConfig

    vision_model: RBLNVisionModelConfig
    text_model: RBLNTextModelConfig

    def __init__(
        self,
        batch_size: int | None = None,
        vision_model: RBLNModelConfig | Mapping[str, Any] | None = None,
        text_model: RBLNModelConfig | Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Take the settings of a model.

        Args:
            batch_size: rows of a batch; 1 if it is None. The vision model runs one frame at a time whatever it is.
            vision_model: settings of the vision model, as a dictionary or an object.
            text_model: settings of the language model, likewise; among them `num_devices`.
            **kwargs: `device`, `npu`, `create_runtimes`, `num_devices` (of the connector: 1), `timeout`,
                `activate_profiler`.

        Raises:
            ValueError: `batch_size` is no positive whole number, a keyword is not known, or settings contradict each
                other.
        """
        super().__init__(batch_size, **kwargs)
        text = _part("text_model", text_model, self.text_class)
        if text.get("batch_size", self.batch_size) != self.batch_size:
            raise ValueError(
                f"batch_size of text_model is {text['batch_size']!r}, that of the model is {self.batch_size}; "
                "they are one setting"
            )
        self.vision_model = RBLNVisionModelConfig(**_part("vision_model", vision_model, RBLNVisionModelConfig))
        self.text_model = self.text_class(**(text | {"batch_size": self.batch_size}))
        self.given |= {"vision_model": self.vision_model, "text_model": self.text_model}
        if self.device is not None and self.text_model.device is None and self.text_model.num_devices > 1:
            raise ValueError(
                f"device is {self.device}, one device; text_model is divided over {self.text_model.num_devices}: "
                "name as many in text_model's device"
            )
        self._check_parts()

    def _check_parts(self) -> None:
        """Look at what parts may not be in this family."""


class RBLNIdefics3ForConditionalGenerationConfig(RBLNVisionLanguageModelConfig):
    """Settings of `RBLNIdefics3ForConditionalGeneration`."""

    text_class = RBLNTextModelConfig


class RBLNMllamaForConditionalGenerationConfig(RBLNVisionLanguageModelConfig):
    """Settings of `RBLNMllamaForConditionalGeneration`; 0 among `image_slots` is for texts without images."""


class RBLNIdeficsForVisionText2TextConfig(RBLNVisionLanguageModelConfig):
    """Settings of `RBLNIdeficsForVisionText2Text`, in which a text without images has one slot of zeros."""

    def _check_parts(self) -> None:
        if 0 in getattr(self.text_model, "image_slots", ()):
            raise ValueError("image_slots holds 0; Idefics has no text without an image slot, from 1 on is valid")


def _take_alias(values: dict[str, Any]) -> None:
    alias = values.pop("tensor_parallel_size", None)
    if alias is None:
        return
    if values.get("num_devices") not in (None, alias):
        raise ValueError(
            f"tensor_parallel_size is {alias!r} and num_devices is {values['num_devices']!r}; they are one setting"
        )
    values["num_devices"] = alias


def _part(name: str, given: object, kind: type[RBLNModelConfig]) -> dict[str, Any]:
    if isinstance(given, kind):
        return dict(given.given)
    if given is not None and not isinstance(given, Mapping):
        raise ValueError(f"{name} is a {type(given).__name__}; it has to be a dictionary or a {kind.__name__}")
    return {str(key): value for key, value in (given or {}).items() if value is not None}


def _is_number(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
