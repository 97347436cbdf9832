"""Checks nibble's checkpoints against transformers, compressed-tensors and ModelOpt: checks.py NIBBLE WORK-FOLDER

Prints a line per check with its figures; exits 1 if one fails.
"""

import json
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import transformers
from compressed_tensors.compressors.nvfp4 import base as nvfp4_compressor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    CompressedTensorsConfig,
    GenerationConfig,
    GptOssForCausalLM,
    Mxfp4Config,
    PreTrainedModel,
)

from tensors import Tensor, dequantized, read, read_folder, write

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "testdata/quant/tiny_gptoss"
REFERENCE = json.loads((ROOT / "testdata/model/tiny-gpt-oss.json").read_text())

# The bounds of testdata/model/README.md for the trained model in 16-bit arithmetic.
BF16_RELATIVE, BF16_DIVERGENCE = 3e-2, 4e-3
F32_RELATIVE = 1e-4
INPUT_SCALE_RELATIVE = 0.02


class Failed(Exception):
    """A check's answer is no; the text says why."""


@dataclass(frozen=True)
class Model:
    name: str
    folder: Path
    sequences: list[list[int]]
    prompts: list[list[int]]  # for greedy generation, which needs a tokenizer beside the weights

    bounded: bool = False  # testdata/model/README.md has bounds for its 16-bit logits

    @property
    def dtypes(self) -> list[tuple[torch.dtype, str]]:
        return [(torch.float32, "f32")] + [(torch.bfloat16, "bf16")] * self.bounded


class Nibble:
    def __init__(self, binary: str) -> None:
        self.binary = binary

    def run(self, *arguments: object) -> str:
        done = subprocess.run([self.binary, *map(str, arguments)], capture_output=True, text=True)
        if done.returncode != 0:
            raise Failed(f"nibble {arguments[0]} ended with {done.returncode}: {done.stderr.strip()}")
        return done.stdout

    def quantize(self, source: Path, out: Path, *flags: object) -> Path:
        self.run("quantize", source, "--out", out, "--quiet", *flags)
        return out

    def logits(self, folder: Path, sequences: list[list[int]], scratch: Path) -> list[np.ndarray]:
        found = []
        for ids in sequences:
            file = scratch / "logits.safetensors"
            file.unlink(missing_ok=True)
            self.run("logits", folder, "--ids", ",".join(map(str, ids)), "--out", file, "--device", "cpu", "--quiet")
            found.append(read(file)["logits"].numbers())
        return found

    def greedy(self, folder: Path, prompts: list[list[int]], count: int, scratch: Path) -> list[list[int]]:
        file = scratch / "prompts.jsonl"
        file.write_text("".join(json.dumps({"prompt_token_ids": ids}) + "\n" for ids in prompts))
        arguments = ["--prompts", file, "--max-tokens", count, "--temperature", 0, "--ignore-eos"]
        output = self.run("generate", folder, *arguments, "--device", "cpu", "--quiet", "--json")
        return [answer["choices"][0]["token_ids"] for answer in json.loads(output)["outputs"]]


class Report:
    def __init__(self) -> None:
        self.passed = 0
        self.failed: list[str] = []

    @contextmanager
    def subject(self, title: str) -> Iterator[None]:
        """What several checks need; if it cannot be made, that is one failure."""
        try:
            yield
        except Exception as error:  # a reference implementation may raise anything
            self.line(title, error)

    def check(self, title: str, answer: Callable[[], str]) -> None:
        """`answer` gives the figures, or raises `Failed` with them."""
        try:
            self.line(title, answer())
        except Exception as error:  # a reference implementation may raise anything
            self.line(title, error)

    def line(self, title: str, answer: str | Exception) -> None:
        word = "ok  "
        if isinstance(answer, Exception):
            word = "FAIL"
            self.failed.append(title)
            if not isinstance(answer, Failed):
                answer = f"{type(answer).__name__}: {answer}"
        else:
            self.passed += 1
        print(f"{word}  {title:<68}  {answer}", flush=True)


def load(folder: Path, dtype: torch.dtype, **options: object) -> PreTrainedModel:
    """As any program loads it; a tensor that is missing, unknown or of another shape is a failure."""
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation="eager", output_loading_info=True, **options
    )
    wrong = {kind: sorted(map(str, names))[:4] for kind, names in info.items() if names}
    if wrong:
        raise Failed(f"transformers reports {wrong}")
    if not isinstance(model, GptOssForCausalLM):
        raise Failed(f"transformers made a {type(model).__name__}")
    return model


@torch.no_grad()
def reference_logits(model: PreTrainedModel, sequences: list[list[int]]) -> list[np.ndarray]:
    return [model(torch.tensor([ids])).logits[0].float().numpy() for ids in sequences]


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def agreement(ours: list[np.ndarray], theirs: list[np.ndarray], dtype: torch.dtype) -> str:
    """The figures, each the worst over sequences; raises `Failed` outside the bounds of `dtype`."""
    relative, divergence = 0.0, 0.0
    same, positions = 0, 0
    for a, b in zip(ours, theirs, strict=True):
        if a.shape != b.shape:
            raise Failed(f"logits are {a.shape} here and {b.shape} there")
        # RMS of the difference over RMS. In float32 the worst position counts, in 16 bits the whole sequence.
        axis = 1 if dtype == torch.float32 else None
        error = np.sqrt(np.square(a - b).mean(axis=axis) / np.square(b).mean(axis=axis))
        relative = max(relative, float(error.max()))
        log_a, log_b = log_softmax(a), log_softmax(b)
        divergence = max(divergence, float((np.exp(log_a) * (log_a - log_b)).sum(axis=1).mean()))
        equal = a.argmax(axis=1) == b.argmax(axis=1)
        same, positions = same + int(equal.sum()), positions + len(equal)
    figures = f"relative error {relative:.1e}, argmax equal at {same} of {positions}"
    if dtype == torch.float32:
        good = relative < F32_RELATIVE and same == positions
    else:
        figures += f", KL {divergence:.1e}"
        good = relative <= BF16_RELATIVE and divergence <= BF16_DIVERGENCE
    if not good:  # NaN ends here too
        raise Failed(figures)
    return figures


def same_tokens(ours: list[list[int]], model: PreTrainedModel, prompts: list[list[int]], count: int) -> str:
    model.generation_config = GenerationConfig(do_sample=False, max_new_tokens=count, pad_token_id=0)
    equal = 0
    for ids, tokens in zip(prompts, ours, strict=True):
        prompt = torch.tensor([ids])
        answer = model.generate(prompt, attention_mask=torch.ones_like(prompt))[0, len(ids) :].tolist()
        if len(tokens) != count or len(answer) != count:
            raise Failed(f"{len(tokens)} tokens here and {len(answer)} there, expected {count}")
        equal += tokens == answer
    figures = f"{equal} of {len(prompts)} continuations of {count} tokens equal"
    if equal != len(prompts):
        raise Failed(figures)
    return figures


# compressed-tensors unpacks into BF16 whatever the model's type, so that a product of a code and its scales is rounded.
# For a comparison in float32 its own code is told to unpack into float32; nothing else of the path changes.
exact_decompression = partial(
    mock.patch.object,
    nvfp4_compressor,
    "unpack_fp4_from_uint8",
    partial(nvfp4_compressor.unpack_fp4_from_uint8, dtype=torch.float32),
)


class Checks:
    def __init__(self, nibble: Nibble, work: Path, report: Report) -> None:
        self.nibble, self.work, self.report = nibble, work, report

    def folder(self, title: str, model: Model, folder: Path, options: dict[str, object]) -> None:
        """The logits of a folder that transformers loads with `options`, in both types."""
        with self.report.subject(title):
            ours = self.nibble.logits(folder, model.sequences, self.work)
            for dtype, name in model.dtypes:
                self.report.check(
                    f"{title}, {name}",
                    lambda: agreement(
                        ours, reference_logits(load(folder, dtype, **options), model.sequences), dtype
                    ),
                )

    def quantized(self, model: Model, *flags: object) -> tuple[str, Path]:
        title = f"{model.name}: {' '.join(str(flag).removeprefix('--') for flag in flags)}"
        out = self.work / "quantized"
        shutil.rmtree(out, ignore_errors=True)
        return title, self.nibble.quantize(model.folder, out, "--calibration", self.calibration(), *flags)

    def compressed_tensors(self, model: Model, *flags: object) -> None:
        with self.report.subject(f"{model.name}: compressed-tensors"):
            title, folder = self.quantized(model, "--format", "compressed-tensors", "--recipe", *flags)
            ours = self.nibble.logits(folder, model.sequences, self.work)
            dense = {"quantization_config": CompressedTensorsConfig(dequantize=True)}

            def theirs(dtype: torch.dtype, options: dict[str, object]) -> list[np.ndarray]:
                return reference_logits(load(folder, dtype, **options), model.sequences)

            def exact() -> str:
                with exact_decompression():
                    return agreement(ours, theirs(torch.float32, dense), torch.float32)

            def rounded(dtype: torch.dtype, options: dict[str, object]) -> str:
                return agreement(ours, theirs(dtype, options), torch.bfloat16)

            self.report.check(f"{title}, unpacked in f32", exact)
            self.report.check(f"{title}, unpacked in bf16, f32", lambda: rounded(torch.float32, dense))
            if model.bounded:
                self.report.check(f"{title}, unpacked in bf16, bf16", lambda: rounded(torch.bfloat16, dense))
                self.report.check(f"{title}, packed, bf16", lambda: rounded(torch.bfloat16, {}))

    def fake_bf16(self, model: Model, *flags: object) -> None:
        with self.report.subject(f"{model.name}: fake-bf16"):
            title, folder = self.quantized(model, "--format", "fake-bf16", "--recipe", *flags)
            self.folder(title, model, folder, {})
            if model.prompts:
                count = 16
                self.report.check(
                    f"{title}, greedy, f32",
                    lambda: same_tokens(
                        self.nibble.greedy(folder, model.prompts, count, self.work),
                        load(folder, torch.float32),
                        model.prompts,
                        count,
                    ),
                )

    def modelopt(self, model: Model, *flags: object) -> None:
        """The packed values, decoded here, make the model that nibble runs."""
        with self.report.subject(f"{model.name}: modelopt"):
            title, folder = self.quantized(model, "--format", "modelopt", "--recipe", *flags)

            def answer() -> str:
                config = AutoConfig.from_pretrained(folder)
                del config.quantization_config
                reference = AutoModelForCausalLM.from_config(
                    config, attn_implementation="eager", dtype=torch.float32
                ).eval()
                weights = dequantized(read_folder(folder))
                reference.load_state_dict({name: torch.tensor(value) for name, value in weights.items()}, strict=True)
                ours = self.nibble.logits(folder, model.sequences, self.work)
                return agreement(ours, reference_logits(reference, model.sequences), torch.float32)

            self.report.check(f"{title}, decoded by NumPy, f32", answer)

    def plain(self, model: Model, *flags: object) -> None:
        with self.report.subject(f"{model.name}: {' '.join(map(str, flags))}"):
            title, folder = self.quantized(model, *flags)
            options = {"quantization_config": Mxfp4Config(dequantize=True)} if "mxfp4" in flags else {}
            self.folder(title, model, folder, options)

    def export(self, name: str, source: Path, recipe: str, algorithm: str) -> None:
        """A folder against ModelOpt's own export of the same model, tensor by tensor and key by key."""
        title = f"modelopt's {name}: {recipe}, {algorithm}"
        with self.report.subject(title):
            tensors, configs = read_folder(GOLDEN / name), read_configs(GOLDEN / name)
            flags = ["--format", "modelopt", "--recipe", recipe, "--algorithm", algorithm]
            if configs["hf_quant_config.json"]["quantization"]["quant_algo"] == "NVFP4":
                flags += ["--activations", "nvfp4", "--calibration", self.calibration()]
            if configs["hf_quant_config.json"]["quantization"]["kv_cache_quant_algo"]:
                flags += ["--kv-cache", "fp8"]
            out = self.work / "export"
            shutil.rmtree(out, ignore_errors=True)
            self.nibble.quantize(source, out, *flags)
            ours = read_folder(out)
            if name == "nvfp4_cast_from_mxfp4":  # that export holds the expert tensors only
                ours = {key: tensor for key, tensor in ours.items() if ".mlp.experts." in key}
            self.report.check(f"{title}, tensors", lambda: same_tensors(ours, tensors))
            for file in configs:
                self.report.check(f"{title}, {file}", lambda: same_keys(read_configs(out)[file], configs[file]))

    def calibration(self) -> Path:
        """The rows that ModelOpt's exports were calibrated on, as JSON lines of ids."""
        rows = read(GOLDEN / "calib.safetensors")["calib_input_ids"].numbers()
        file = self.work / "calibration.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows.tolist()))
        return file


def read_configs(folder: Path) -> dict[str, dict]:
    """Both configurations without the producer, which is meant to differ."""
    configs = {file: json.loads((folder / file).read_text()) for file in ("config.json", "hf_quant_config.json")}
    for holder in configs["hf_quant_config.json"], configs["config.json"]["quantization_config"]:
        del holder["producer"]
    return configs


def same_tensors(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> str:
    if ours.keys() != theirs.keys():
        raise Failed(f"only here: {sorted(ours.keys() - theirs.keys())}, only there: {sorted(theirs.keys() - ours.keys())}")
    worst, size = 0.0, 0
    for name, tensor in theirs.items():
        mine = ours[name]
        if (mine.dtype, mine.shape) != (tensor.dtype, tensor.shape):
            raise Failed(f"{name} is {mine.dtype} {mine.shape} here, {tensor.dtype} {tensor.shape} there")
        if name.endswith(("input_scale", ".k_scale", ".v_scale")):  # of a forward pass in BF16
            worst = max(worst, float(abs(mine.numbers() / tensor.numbers() - 1).max()))
        elif mine.data != tensor.data:
            raise Failed(f"{name} holds other bytes")
        size += len(tensor.data)
    figures = f"{len(theirs)} tensors, {size} bytes equal"
    if worst > 0:
        figures += f", activation scales within {worst:.1e}"
    if not worst <= INPUT_SCALE_RELATIVE:
        raise Failed(figures)
    return figures


def leaves(value: object, path: str = "") -> dict[str, object]:
    """Every value of a JSON document under its path; the order of keys does not count, that of lists does."""
    match value:
        case dict() if value:
            return {key: leaf for name in value for key, leaf in leaves(value[name], f"{path}.{name}").items()}
        case list() if value:
            return {key: leaf for i, item in enumerate(value) for key, leaf in leaves(item, f"{path}[{i}]").items()}
        case _:
            return {path: value}


def same_keys(ours: dict, theirs: dict) -> str:
    mine, other = leaves(ours), leaves(theirs)
    absent = object()
    different = sorted(key for key in mine | other if mine.get(key, absent) != other.get(key, absent))
    if different:
        raise Failed(f"differs at {different[:6]}")
    return f"{len(other)} values equal"


def mixed_source(work: Path) -> Path:
    """The golden source with its experts in MXFP4: a checkpoint as openai/gpt-oss is published."""
    folder = work / "mxfp4-source"
    folder.mkdir()
    experts = read_folder(GOLDEN / "mxfp4_source")
    replaced = {name.removesuffix("_blocks") for name in experts}
    rest = {name: tensor for name, tensor in read_folder(GOLDEN / "source").items() if name not in replaced}
    write(folder / "model.safetensors", rest | experts)
    config = json.loads((GOLDEN / "source/config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "mxfp4",
        "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"],
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def main() -> int:
    began = time.monotonic()
    binary, work = sys.argv[1], Path(sys.argv[2])
    torch.set_num_threads(2)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", message="You passed `quantization_config`")

    report = Report()
    checks = Checks(Nibble(binary), work, report)
    trained = [REFERENCE["logits"][name]["ids"] for name in ("raw", "chat", "long")]
    prompts = [prompt["ids"] for prompt in REFERENCE["prompts"].values()]
    calibration = read(GOLDEN / "calib.safetensors")["calib_input_ids"].numbers()
    random = [*calibration.tolist(), calibration.flatten().tolist()]
    models = [
        Model("tiny BF16", ROOT / "testdata/tiny-gpt-oss-bf16", trained, prompts),
        Model("tiny MXFP4", ROOT / "models/tiny-gpt-oss", trained, prompts, bounded=True),
        Model("random BF16", GOLDEN / "source", random, []),
        Model("random MXFP4", mixed_source(work), random, []),
    ]
    for model in models:
        dequantize = {"quantization_config": Mxfp4Config(dequantize=True)} if "MXFP4" in model.name else {}
        checks.folder(f"{model.name}: as it is", model, model.folder, dequantize)
        checks.compressed_tensors(model, "linear", "--algorithm", "mse")
        checks.compressed_tensors(model, "linear")
        checks.fake_bf16(model, "experts")
        checks.fake_bf16(model, "linear")
        checks.modelopt(model, "experts")
        checks.modelopt(model, "linear")
        checks.modelopt(model, "all", "--algorithm", "max", "--scales-per", "expert")
        checks.plain(model, "--format", "mxfp4")
        checks.plain(model, "--format", "bf16")
        checks.plain(model, "--format", "bf16", "--max-shard-size", 1_000_000)

    source, mixed = models[2].folder, models[3].folder
    checks.export("w4a16_nvfp4", source, "linear", "max")
    checks.export("nvfp4_default", source, "linear", "max")
    checks.export("nvfp4_default_kv_fp8", source, "linear", "max")
    checks.export("nvfp4_experts_only", source, "experts", "max")
    checks.export("nvfp4_four_over_six", source, "linear", "four-over-six")
    checks.export("nvfp4_cast_from_mxfp4", mixed, "experts", "cast")

    print(f"{report.passed} passed, {len(report.failed)} failed, {time.monotonic() - began:.0f} s")
    return 1 if report.failed else 0


if __name__ == "__main__":
    sys.exit(main())
