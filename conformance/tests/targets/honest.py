"""An honest Idefics3 in numpy and float64, written from the rules alone, as a target for tests of the suite.

Legend of shapes: B rows, S positions, F real frames, P patches, C width of the tower, D width of the text model,
H heads, K key and value heads, d head width.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from vlmqual_contract.errors import Unsupported, UsageError
from vlmqual_contract.target import Capability, Info

CAPABILITIES = frozenset(Capability) - {Capability.PREPROCESS, Capability.TENSOR_PARALLEL}


def read_weights(path: Path) -> dict[str, np.ndarray]:
    data = path.read_bytes()
    (size,) = struct.unpack_from("<Q", data)
    header = json.loads(data[8 : 8 + size])
    weights = {}
    for name, item in header.items():
        if name == "__metadata__":
            continue
        start, end = item["data_offsets"]
        bits = np.frombuffer(data[8 + size + start : 8 + size + end], "<u2").astype(np.uint32) << 16
        weights[name.removeprefix("model.")] = bits.view(np.float32).astype(np.float64).reshape(item["shape"])
    return weights


def softmax(x: np.ndarray) -> np.ndarray:
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


def gelu_tanh(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


class Network:
    def __init__(self, folder: Path) -> None:
        self.w = read_weights(folder / "model.safetensors")
        config = json.loads((folder / "config.json").read_text("utf-8"))
        self.text, self.vision = config["text_config"], config["vision_config"]
        self.image_token, self.factor = config["image_token_id"], config["scale_factor"]
        self.frequencies = self._frequencies()

    def _frequencies(self) -> np.ndarray:
        width, rule = self.text["head_dim"], self.text["rope_scaling"]
        plain = self.text["rope_theta"] ** (-np.arange(0, width, 2) / width)
        context = rule["original_max_position_embeddings"]
        waves = context * plain / (2 * math.pi)  # how often a frequency turns within the original context
        low, high = rule["low_freq_factor"], rule["high_freq_factor"]
        smooth = np.clip((waves - low) / (high - low), 0, 1)
        return (1 - smooth) * plain / rule["factor"] + smooth * plain

    def norm(self, x: np.ndarray, name: str) -> np.ndarray:  # LayerNorm
        x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + self.vision["layer_norm_eps"])
        return x * self.w[f"{name}.weight"] + self.w[f"{name}.bias"]

    def linear(self, x: np.ndarray, name: str) -> np.ndarray:
        bias = self.w.get(f"{name}.bias")
        y = x @ self.w[f"{name}.weight"].T
        return y if bias is None else y + bias

    def see(self, pixels: np.ndarray, mask: np.ndarray | None) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        frames = pixels.reshape(-1, *pixels.shape[2:]).astype(np.float64)
        seen = np.ones((len(frames), *frames.shape[2:])) if mask is None else mask.reshape(-1, *mask.shape[2:])
        real = frames.any(axis=(1, 2, 3))
        frames, seen = frames[real], seen[real]
        p, n = self.vision["patch_size"], self.vision["image_size"] // self.vision["patch_size"]
        count = len(frames)
        valid = seen.reshape(count, n, p, n, p).any(axis=(2, 4))  # (F, n, n)
        patches = frames.reshape(count, 3, n, p, n, p).transpose(0, 2, 4, 1, 3, 5).reshape(count, n * n, -1)
        tower = "vision_model"
        kernel = self.w[f"{tower}.embeddings.patch_embedding.weight"]
        x = patches @ kernel.reshape(len(kernel), -1).T + self.w[f"{tower}.embeddings.patch_embedding.bias"]
        x = x + self.w[f"{tower}.embeddings.position_embedding.weight"][self.places(valid)]
        taps = {"vision.embeddings": x}
        hidden = np.where(valid.reshape(count, 1, 1, n * n), 0.0, -np.inf)
        heads = self.vision["num_attention_heads"]
        for index in range(self.vision["num_hidden_layers"]):
            layer = f"{tower}.encoder.layers.{index}"
            y = self.norm(x, f"{layer}.layer_norm1")
            q, k, v = (
                self.linear(y, f"{layer}.self_attn.{name}").reshape(count, n * n, heads, -1).transpose(0, 2, 1, 3)
                for name in ("q_proj", "k_proj", "v_proj")
            )
            y = softmax(q @ k.transpose(0, 1, 3, 2) / math.sqrt(q.shape[-1]) + hidden) @ v
            x = x + self.linear(y.transpose(0, 2, 1, 3).reshape(x.shape), f"{layer}.self_attn.out_proj")
            y = self.linear(self.norm(x, f"{layer}.layer_norm2"), f"{layer}.mlp.fc1")
            x = x + self.linear(gelu_tanh(y), f"{layer}.mlp.fc2")
            taps[f"vision.layers.{index}"] = x
        x = taps["vision.post_layernorm"] = self.norm(x, f"{tower}.post_layernorm")
        s = self.factor
        x = x.reshape(count, n // s, s, n // s, s, -1).transpose(0, 1, 3, 2, 4, 5).reshape(count, (n // s) ** 2, -1)
        x = taps["connector"] = self.linear(x, "connector.modality_projection.proj")
        return x, taps

    def places(self, valid: np.ndarray) -> np.ndarray:
        n = valid.shape[1]
        ids = np.zeros(valid.shape, np.int64)
        bounds = np.arange(1, n, dtype=np.float32) / np.float32(n)
        for frame, places in zip(valid, ids, strict=True):
            high, wide = int(frame[:, 0].sum()), int(frame[0].sum())
            rows, columns = (
                np.searchsorted(bounds, np.arange(k, dtype=np.float32) / np.float32(k), side="right")
                for k in (high, wide)
            )
            places[frame] = (rows[:, None] * n + columns).reshape(-1)
        return ids.reshape(len(ids), -1)

    def embed(self, ids: np.ndarray, features: np.ndarray | None) -> np.ndarray:
        x = self.w["text_model.embed_tokens.weight"][ids]
        if features is not None:
            places = ids == self.image_token
            if int(places.sum()) != features.shape[0] * features.shape[1]:
                raise ValueError(
                    f"{int(places.sum())} image tokens for {features.shape[0] * features.shape[1]} features"
                )
            x[places] = features.reshape(-1, x.shape[-1])
        return x

    def rms(self, x: np.ndarray, name: str) -> np.ndarray:
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + self.text["rms_norm_eps"]) * self.w[f"{name}.weight"]

    def rotated(self, x: np.ndarray, positions: np.ndarray) -> np.ndarray:  # (B, S, heads, d)
        angles = positions[:, :, None, None] * self.frequencies
        cos, sin = np.cos(angles), np.sin(angles)
        one, two = np.split(x, 2, axis=-1)
        return np.concatenate([one * cos - two * sin, two * cos + one * sin], axis=-1)

    def read(
        self, x: np.ndarray, positions: np.ndarray, keys: np.ndarray, cache: list[tuple[np.ndarray, np.ndarray]]
    ) -> tuple[np.ndarray, dict[str, np.ndarray], list[tuple[np.ndarray, np.ndarray]]]:
        """Run new positions x (B, S, D); `keys` (B, all) says which positions, cached and new, are real."""
        rows, length = x.shape[:2]
        heads, shared, width = (self.text[n] for n in ("num_attention_heads", "num_key_value_heads", "head_dim"))
        total = keys.shape[1]
        causal = np.arange(total) <= np.arange(total - length, total)[:, None]
        allowed = keys[:, None, None, :] & causal
        mask = np.where(allowed | ~allowed.any(-1, keepdims=True), 0.0, -np.inf)  # a padded query may see anything
        taps, grown = {"text.embeddings": x}, []
        for index in range(self.text["num_hidden_layers"]):
            layer = f"text_model.layers.{index}"
            y = self.rms(x, f"{layer}.input_layernorm")
            q = self.linear(y, f"{layer}.self_attn.q_proj").reshape(rows, length, heads, width)
            k = self.linear(y, f"{layer}.self_attn.k_proj").reshape(rows, length, shared, width)
            v = self.linear(y, f"{layer}.self_attn.v_proj").reshape(rows, length, shared, width)
            q, k = self.rotated(q, positions), self.rotated(k, positions)
            if cache:
                k, v = np.concatenate([cache[index][0], k], 1), np.concatenate([cache[index][1], v], 1)
            grown.append((k, v))
            owner = np.arange(heads) // (heads // shared)
            q, kk, vv = (array.transpose(0, 2, 1, 3) for array in (q, k[:, :, owner], v[:, :, owner]))
            y = softmax(q @ kk.transpose(0, 1, 3, 2) / math.sqrt(width) + mask) @ vv
            x = x + self.linear(y.transpose(0, 2, 1, 3).reshape(rows, length, -1), f"{layer}.self_attn.o_proj")
            y = self.rms(x, f"{layer}.post_attention_layernorm")
            gate, up = (self.linear(y, f"{layer}.mlp.{name}") for name in ("gate_proj", "up_proj"))
            x = x + self.linear(gate / (1 + np.exp(-gate)) * up, f"{layer}.mlp.down_proj")
            taps[f"text.layers.{index}"] = x
        x = taps["text.norm"] = self.rms(x, "text_model.norm")
        return x @ self.w["lm_head.weight"].T, taps, grown


class Seen:
    dtype = "float64"

    def __init__(self, hidden: np.ndarray, taps: Mapping[str, np.ndarray]) -> None:
        self.hidden, self._taps = hidden, taps

    def arrays(self) -> dict[str, np.ndarray]:
        return {"image_hidden_states": self.hidden}

    def taps(self) -> dict[str, np.ndarray]:
        return dict(self._taps)


class Read:
    dtype = "float64"

    def __init__(self, every: np.ndarray, last: np.ndarray, taps: Any, cache: Any, keys: np.ndarray) -> None:
        self.every, self.last, self._taps, self.cache, self.keys = every, last, taps, cache, keys

    def tokens(self) -> np.ndarray:
        return self.last.argmax(-1)

    def logits(self, all_positions: bool = False) -> np.ndarray:
        return self.every if all_positions else self.last

    def taps(self) -> dict[str, np.ndarray]:
        return dict(self._taps)


class HonestSession:
    def __init__(self, network: Network) -> None:
        self.network = network

    def preprocess(self, prompts: Any) -> Any:
        raise Unsupported("numpy reads no images")

    def vision(self, inputs: Mapping[str, np.ndarray]) -> Seen:
        return Seen(*self.network.see(inputs["pixel_values"], inputs.get("pixel_attention_mask")))

    def prefill(self, inputs: Mapping[str, np.ndarray], features: Any = None) -> Read:
        if features is None and "pixel_values" in inputs:
            features = self.vision(inputs)
        arrays = features.arrays() if isinstance(features, Seen) else features
        keys = inputs["attention_mask"] != 0
        x = self.network.embed(inputs["input_ids"], None if arrays is None else arrays["image_hidden_states"])
        positions = np.maximum(keys.cumsum(1) - 1, 0)
        every, taps, cache = self.network.read(x, positions, keys, [])
        last = keys.shape[1] - 1 - keys[:, ::-1].argmax(1)
        return Read(every, every[np.arange(len(every)), last], taps, cache, keys)

    def decode(self, step: Read, tokens: np.ndarray | None = None) -> Read:
        ids = step.tokens() if tokens is None else tokens
        positions = step.keys.sum(1, keepdims=True)
        keys = np.concatenate([step.keys, np.ones((len(step.keys), 1), bool)], axis=1)
        every, taps, cache = self.network.read(self.network.embed(ids[:, None], None), positions, keys, step.cache)
        return Read(every, every[:, -1], taps, cache, keys)

    def synchronize(self) -> None:
        pass


class Honest:
    session = HonestSession

    def __init__(
        self, library: str = "", without: str = "", dtype: str = "float64", families: str = "idefics3"
    ) -> None:
        gone = {Capability(name) for name in without.split("+") if name}
        self.info = Info(
            name="honest",
            version="1.0",
            device="cpu",
            runtime=f"numpy {np.__version__}",
            dtype=dtype,
            capabilities=CAPABILITIES - gone,
            families=tuple(filter(None, families.split("+"))),
            library=library,
        )

    @contextmanager
    def open(self, model: Any, options: Any) -> Iterator[HonestSession]:
        if options.tp != 1:
            raise UsageError("numpy knows one rank")
        yield self.session(Network(Path(model.path)))

    def probe(self, name: str, shape: tuple[int, ...], dtype: str) -> float:
        raise Unsupported(f"no probe {name}")
