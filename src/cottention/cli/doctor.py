"""`cottention doctor`: what this machine can run, what is missing, and what to do about it.

It looks at the installed versions, the processor and the GPUs, runs every implementation of the operation on a small
example against `naive`, the equations themselves, and tells which one will be taken. Exit code 1 when something needs
mending; an implementation that is missing is named with the reason and the remedy, and is no defect.

With --model it compares a finished directory with the hashes that it was written with instead.

    cottention doctor --json
    cottention doctor --model runs/bert
"""

from __future__ import annotations

import json
import platform
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path

import jsonargparse

from cottention import __version__
from cottention.cli.main import new_parser
from cottention.files import usable_cores

_SHOWN_PACKAGES = ("torch", "triton", "transformers", "datasets", "accelerate", "tokenizers", "numpy")

# Of sums of some hundred products of numbers near 1. float64 leaves rounding alone, 1e-16 times a few hundred; what has
# no float64 is tried in float32, 6e-8 times as many.
_LARGEST_ERROR = {"float64": 1e-11, "float32": 1e-4}


@dataclass(kw_only=True)
class Diagnosis:
    """What was found; `problems` holds one line each, with its remedy."""

    cottention: str = __version__
    python: str = field(default_factory=platform.python_version)
    platform: str = field(default_factory=platform.platform)
    packages: dict[str, str | None] = field(default_factory=dict)
    cpus: int = field(default_factory=usable_cores)
    threads: int | None = None
    gpus: list[str] = field(default_factory=list)
    implementations: dict[str, str] = field(default_factory=dict)
    chosen: dict[str, str] = field(default_factory=dict)
    models_registered: bool = False
    problems: list[str] = field(default_factory=list)


def build_parser() -> jsonargparse.ArgumentParser:
    """The flags of `cottention doctor`."""
    parser = new_parser("doctor", "Say what this machine can run, what is missing, and what to do about it.")
    parser.add_argument(
        "--model",
        metavar="DIR",
        help="only compare a model, a run or a corpus with the hashes that it was written with, file by file",
    )
    parser.add_argument("--json", action="store_true", help="print the findings as one JSON object")
    return parser


def run(args: jsonargparse.Namespace) -> int:
    """Examine and report; 1 when there is a problem."""
    if args.model is not None:
        return _compare(args)
    diagnosis = diagnose()
    print(json.dumps(asdict(diagnosis), indent=2) if args.json else _as_text(diagnosis))
    return 1 if diagnosis.problems else 0


def _compare(args: jsonargparse.Namespace) -> int:
    from cottention.cli._seals import compare

    parts, problems = compare(Path(args.model).expanduser())
    if args.json:
        print(json.dumps({"parts": parts, "problems": problems}, indent=2))
    else:
        print("\n".join(f"{part}: {said}" for part, said in parts.items()))
        print("\n".join(["", *(f"problem: {each}" for each in problems)]) if problems else "\nNothing is damaged.")
    return 1 if problems else 0


def diagnose() -> Diagnosis:
    """Look at packages, devices, implementations and the registration with transformers, in this order."""
    diagnosis = Diagnosis()
    _look_at_packages(diagnosis)
    try:
        import torch
    except ImportError as error:
        diagnosis.problems.append(f"torch cannot be imported ({error}): pip install torch")
        return diagnosis
    diagnosis.threads = torch.get_num_threads()
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        diagnosis.gpus.append(f"{device.name}, {device.total_memory / 2**30:.0f} GiB, sm_{device.major}{device.minor}")
    _try_implementations(diagnosis)
    _look_at_registration(diagnosis)
    return diagnosis


def _look_at_packages(diagnosis: Diagnosis) -> None:
    """Compare what is installed with what our own metadata asks for."""
    diagnosis.packages = {name: _version_of(name) for name in _SHOWN_PACKAGES}
    try:
        from packaging.requirements import Requirement
    except ImportError:
        diagnosis.problems.append("the dependencies are not installed: pip install cottention")
        return
    for line in metadata.requires("cottention") or []:
        requirement = Requirement(line)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        installed = _version_of(requirement.name)
        if installed is None:
            diagnosis.problems.append(f"{requirement.name} is not installed: pip install '{requirement}'")
        elif not requirement.specifier.contains(installed, prereleases=True):
            diagnosis.problems.append(
                f"{requirement.name} {installed} is outside {requirement.specifier}: pip install '{requirement}'"
            )


def _version_of(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _try_implementations(diagnosis: Diagnosis) -> None:
    """Run each implementation on the CPU, and on the first GPU, against naive in float64 on the CPU."""
    import torch

    from cottention.ops import IMPLEMENTATIONS

    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    for name in IMPLEMENTATIONS:
        outcomes = [_outcome(name, device, diagnosis.problems) for device in devices]
        diagnosis.implementations[name] = "; ".join(outcomes)
    for device in devices:
        diagnosis.chosen[device] = _chosen(device)
        diagnosis.chosen[f"{device} with beta"] = _chosen(device, erases=True)


def _outcome(name: str, device: str, problems: list[str]) -> str:
    for dtype, largest_error in _LARGEST_ERROR.items():
        try:
            error = _error_against_naive(name, device, dtype)
        except TypeError as reason:  # not in this dtype
            refusal = reason
            continue
        except (RuntimeError, ValueError, ImportError, NotImplementedError) as reason:
            # An implementation that a device or an install cannot run says why; that is no defect of the machine.
            refusal = reason
            break
        if not error <= largest_error:
            problems.append(
                f"{name} on {device} differs from the equations by {error:.1e}: reinstall torch and cottention, "
                "and report it when that does not help"
            )
            return f"{device}: wrong"
        return f"{device}: ok{_how_native_runs() if name == 'native' else ''}"
    if name == "triton" and device == "cpu":
        return "cpu: not needed on a CPU"
    return f"{device}: cannot run ({' '.join(str(refusal).split())})"


def _how_native_runs() -> str:
    import torch

    from cottention.ops.native import binding

    used = binding.instruction_set()
    others = [each for each in binding.instruction_sets() if each != used]
    beside = f" (this processor also runs {', '.join(others)})" if others else ""
    return f", {used}{beside}, {torch.get_num_threads()} threads"


def _chosen(device: str, *, erases: bool = False) -> str:
    """What "auto" takes for each float type on this device; with beta on a GPU also whose kernels, or why not."""
    import torch

    from cottention.ops import choose_implementation, why_not_erase

    whose = ""
    if erases and device == "cuda":
        reason = why_not_erase(torch.device(device), torch.bfloat16, 16)
        version = _version_of("flash-linear-attention")
        whose = f"; triton is flash-linear-attention {version} there" if reason is None else f"; not triton: {reason}"

    dtypes: dict[str, list[str]] = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        token = torch.empty(1, 1, 1, 16, dtype=dtype, device=device)
        name = choose_implementation("auto", token, token, is_gated=erases, erases=erases)
        dtypes.setdefault(name, []).append(str(dtype).removeprefix("torch."))
    if len(dtypes) == 1:
        return f"{next(iter(dtypes))} for every float type{whose}"
    return ", ".join(f"{name} for {', '.join(types)}" for name, types in dtypes.items()) + whose


def _error_against_naive(name: str, device: str, dtype: str) -> float:
    """Largest difference of outputs and gradients, causal and not, on one small padded batch."""
    import torch

    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 2, 67, 2, 16, dtype=torch.float64, generator=generator)
    norm_const = torch.tensor([0.5, -1.0], dtype=torch.float64)
    mask = torch.arange(67) < torch.tensor([[67], [50]])
    inputs = [q, k, v, norm_const]
    in_dtype = [each.to(getattr(torch, dtype)) for each in inputs]
    errors = []
    for causal in (True, False):
        expected = _output_and_gradients("naive", "cpu", inputs, mask, causal)
        found = _output_and_gradients(name, device, in_dtype, mask, causal)
        errors += [(a - b).abs().max() for a, b in zip(expected, found, strict=True)]
    return float(torch.stack(errors).max())


def _output_and_gradients(name: str, device: str, inputs: list, mask, causal: bool) -> list:
    from cottention.ops import cosine_attention

    leaves = [each.detach().to(device).requires_grad_() for each in inputs]
    o, _ = cosine_attention(*leaves, causal=causal, attention_mask=mask.to(device), implementation=name)
    o.square().sum().backward()
    return [each.detach().cpu() for each in (o, *(leaf.grad for leaf in leaves))]


def _look_at_registration(diagnosis: Diagnosis) -> None:
    """Does AutoConfig know our models? That is what `pipeline` and `from_pretrained` rest on."""
    try:
        from transformers import CONFIG_MAPPING
    except ImportError as error:
        diagnosis.problems.append(f"transformers cannot be imported ({error}): pip install cottention")
        return
    diagnosis.models_registered = "cottention-gpt" in CONFIG_MAPPING
    if not diagnosis.models_registered:
        diagnosis.problems.append("AutoModel does not know the models: pip install --force-reinstall cottention")


def _as_text(diagnosis: Diagnosis) -> str:
    shown = asdict(diagnosis)
    needless = () if shown["gpus"] else ("triton",)
    packages = ", ".join(
        f"{name} {version or ('not needed on a CPU' if name in needless else 'missing')}"
        for name, version in shown["packages"].items()
    )
    rows: list[tuple[str, str]] = [
        ("cottention", shown["cottention"]),
        ("python", f"{shown['python']} on {shown['platform']}"),
        ("packages", packages),
        ("processor", f"{shown['cpus']} cores, torch uses {shown['threads'] or 'no'} threads"),
        ("GPUs", "; ".join(shown["gpus"]) or "none: everything runs on the processor"),
        *((f"implementation {name}", outcome) for name, outcome in shown["implementations"].items()),
        *((f"auto on {device}", choice) for device, choice in shown["chosen"].items()),
        ("AutoModel", "knows the models" if shown["models_registered"] else "does not know the models"),
    ]
    width = max(len(name) for name, _ in rows) + 2
    lines = [f"{name:<{width}}{value}" for name, value in rows]
    problems = diagnosis.problems
    lines += ["", *(f"problem: {each}" for each in problems)] if problems else ["", "Nothing is missing."]
    return "\n".join(lines)
