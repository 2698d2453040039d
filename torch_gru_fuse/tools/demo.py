"""Train a small nn.GRU model on real text, first eagerly, then compiled through torch_gru_fuse, and compare the two.

The text is the source code that the installed torch package holds; the task is to tell the language (Python, C++, ...) of
64 bytes of it, in files never seen in training. Both runs start from the same weights and see the same batches.

Exit status: 0 when eager and compiled agree, 1 when they do not, 2 when the demo cannot run here.
"""

import argparse
import copy
import json
import os
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from statistics import median

import torch
from torch import Tensor, nn
from torch.hub import tqdm  # the real one where it is installed, else a plain counter

import torch_gru_fuse
from torch_gru_fuse.tools.corpus import Windows, load_corpus

SUMMARY = "train a small model on real text, eager and compiled, and compare"

WINDOW = 64  # bytes of text to classify
BATCH = 64
HELD_OUT = 2048  # windows of the evaluation; a multiple of BATCH
LEARNING_RATE = 1e-2
REWRITING = ("inductor", "gru_fuse")  # the backends that rewrite GRUs

# Compiled may be this many times as far from float64 as eager is. The same sums in another order differ by less than 2;
# a wrong gate or a missing term by thousands.
ERROR_RATIO = 4.0
# ... but where eager happens to be nearly exact, this far at least (of the largest element): 64 steps, one ulp each.
ERROR_FLOOR = WINDOW * torch.finfo(torch.float32).eps
# Two trainings drift apart by rounding. The accuracy of one on HELD_OUT windows has a standard error of about 0.01.
ACCURACY_LIMIT = 0.05


class DemoError(Exception):
    """The demo cannot run here; the message says what to do."""


class LanguageClassifier(nn.Module):
    """bytes [B, T] -> scores [B, languages]"""

    def __init__(self, languages: int, embedding: int = 32, hidden: int = 64, layers: int = 2):
        super().__init__()
        self.embedding = nn.Embedding(256, embedding)
        self.gru = nn.GRU(embedding, hidden, layers, batch_first=True)
        self.head = nn.Linear(hidden, languages)

    def forward(self, text: Tensor) -> Tensor:
        states, _ = self.gru(self.embedding(text))  # [B, T, hidden]
        return self.head(states.mean(dim=1))


@dataclass
class Run:
    """One training and its evaluation. Times in seconds."""

    name: str
    accuracy: float
    final_loss: float
    compile_s: float  # first training step and first evaluation, on a copy of the model
    train_s: float
    step_s: float  # median
    evaluate_s: float


@dataclass
class Comparison:
    """Largest distance from float64, as a fraction of the largest element, of one tensor or of all gradients."""

    name: str
    eager: float
    compiled: float

    @property
    def limit(self) -> float:
        return max(ERROR_RATIO * self.eager, ERROR_FLOOR)

    @property
    def agrees(self) -> bool:
        return self.compiled <= self.limit  # False for nan


@dataclass
class Report:
    device: str
    backend: str
    steps: int
    seed: int
    languages: tuple[str, ...]
    train_files: int
    held_out_files: int
    runs: list[Run] = field(default_factory=list)
    comparisons: list[Comparison] = field(default_factory=list)  # the scores, then every parameter's gradient
    rewrites: list[str] = field(default_factory=list)
    fused_calls: dict[str, int] = field(default_factory=dict)  # of each op, in one training step
    problems: list[str] = field(default_factory=list)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default=None, help='e.g. "cpu" or "cuda:1"; the GPU if there is one')
    parser.add_argument("--steps", type=_positive, default=100, help="training steps (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of weights, files and batches (default: %(default)s)")
    parser.add_argument("--backend", default="inductor", help="of torch.compile (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")


def run(arguments: argparse.Namespace) -> int:
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler reports its start and stop, and a missing GPU, on stderr
    try:
        report = demo(
            device=arguments.device,
            steps=arguments.steps,
            seed=arguments.seed,
            backend=arguments.backend,
            quiet=arguments.json,
        )
    except DemoError as error:
        print(f"torch_gru_fuse demo: {error}", file=sys.stderr)
        return 2
    print(json.dumps(asdict(report), indent=2) if arguments.json else _format(report))
    for problem in report.problems:
        print(f"torch_gru_fuse demo: {problem}", file=sys.stderr)
    return 1 if report.problems else 0


def demo(device: str | None = None, steps: int = 100, seed: int = 0, backend: str = "inductor", quiet: bool = False) -> Report:
    """Train and evaluate eagerly and compiled; see the module's docstring. ``Report.problems`` is empty if all is well."""
    on = _device(device)
    _check_backend(backend, on)
    threads = torch.get_num_threads()
    # Steps this small gain little from threads, and wait for each other where something else wants the cores.
    torch.set_num_threads(1)
    try:
        return _demo(on, steps, seed, backend, quiet)
    finally:
        torch.set_num_threads(threads)


def _demo(on: torch.device, steps: int, seed: int, backend: str, quiet: bool) -> Report:
    corpus = load_corpus(train=steps * BATCH, held_out=HELD_OUT, length=WINDOW, seed=seed)
    report = Report(
        device=_device_name(on),
        backend=backend,
        steps=steps,
        seed=seed,
        languages=corpus.languages,
        train_files=corpus.train_files,
        held_out_files=corpus.held_out_files,
    )
    train, held_out = (Windows(*(t.to(on) for t in part)) for part in (corpus.train, corpus.held_out))

    torch.manual_seed(seed)
    initial = LanguageClassifier(len(corpus.languages))
    if not quiet:
        print(_describe(report, initial), flush=True)

    eager = copy.deepcopy(initial).to(on)
    report.runs.append(_train("eager", eager, eager, train, held_out, quiet))

    before = len(torch_gru_fuse.rewrites())
    with torch_gru_fuse.enable():
        model = copy.deepcopy(initial).to(on)
        compiled = torch.compile(model, fullgraph=True, backend=backend)
        try:
            report.runs.append(_train("compiled", model, compiled, train, held_out, quiet))
        except Exception as error:
            raise DemoError(_explain(error, backend, on)) from error

        # On weights that have been trained, and on text that has not been trained on.
        model.load_state_dict(eager.state_dict())
        batch = Windows(held_out.text[:BATCH], held_out.language[:BATCH])
        report.fused_calls = _fused_calls(compiled, batch)
        report.comparisons = _compare(eager, model, compiled, batch)
    report.rewrites = [str(record) for record in torch_gru_fuse.rewrites()[before:]]
    report.problems = _problems(report)
    return report


def _train(name: str, model: nn.Module, forward: nn.Module, train: Windows, held_out: Windows, quiet: bool) -> Run:
    """Train ``model``, calling it through ``forward`` (itself or its compiled form), and evaluate it."""
    device = train.text.device
    batches = list(zip(train.text.split(BATCH), train.language.split(BATCH), strict=True))

    if not quiet:
        print(f"Training {name}, {len(batches)} steps of {BATCH} windows", flush=True)
    # Compiling, cuDNN's first call and the like: one step and one evaluation that leave the weights as they are.
    started = _clock(device)
    nn.functional.cross_entropy(forward(batches[0][0]), batches[0][1]).backward()
    _accuracy(forward, Windows(*(t[:BATCH] for t in held_out)))
    compile_s = _clock(device) - started

    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
    ticks = [_clock(device)]
    with tqdm(total=len(batches), unit="step", disable=quiet or not sys.stderr.isatty()) as bar:
        for text, language in batches:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(forward(text), language)
            loss.backward()
            optimizer.step()
            ticks.append(_clock(device))
            bar.update(1)
    accuracy = _accuracy(forward, held_out)
    return Run(
        name=name,
        accuracy=accuracy,
        final_loss=loss.item(),
        compile_s=compile_s,
        train_s=ticks[-1] - ticks[0],
        step_s=median(b - a for a, b in zip(ticks, ticks[1:], strict=False)),
        evaluate_s=_clock(device) - ticks[-1],
    )


@torch.no_grad()
def _accuracy(forward: nn.Module, windows: Windows) -> float:
    guesses = torch.cat([forward(text).argmax(dim=1) for text in windows.text.split(BATCH)])
    return (guesses == windows.language).double().mean().item()


def _compare(eager: nn.Module, model: nn.Module, compiled: nn.Module, batch: Windows) -> list[Comparison]:
    """Scores and gradients of one batch, eager and compiled, each against eager in float64 on the CPU."""
    reference = copy.deepcopy(eager).cpu().double()
    exact = _scores_and_gradients(reference, reference, Windows(*(t.cpu() for t in batch)))
    by_eager = _scores_and_gradients(eager, eager, batch)
    by_compiled = _scores_and_gradients(model, compiled, batch)
    return [Comparison(n, _error(by_eager[n], exact[n]), _error(by_compiled[n], exact[n])) for n in exact]


def _scores_and_gradients(model: nn.Module, forward: nn.Module, batch: Windows) -> dict[str, Tensor]:
    model.zero_grad()
    scores = forward(batch.text)
    nn.functional.cross_entropy(scores, batch.language).backward()
    return {"scores": scores.detach()} | {f"d {name}": p.grad for name, p in model.named_parameters()}


def _error(value: Tensor, exact: Tensor) -> float:
    return ((value.cpu().double() - exact).abs().max() / exact.abs().max()).item()


def _fused_calls(compiled: nn.Module, batch: Windows) -> dict[str, int]:
    """How often one training step calls each of the package's ops: what ran, not what a graph was meant to hold."""
    # acc_events: without it torch 2.11 warns of events of earlier cycles, of which there are none.
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True) as profile:
        nn.functional.cross_entropy(compiled(batch.text), batch.language).backward()
    return {e.key: e.count for e in profile.key_averages() if e.key.startswith("torch_gru_fuse::")}


def _problems(report: Report) -> list[str]:
    problems = []
    if not report.fused_calls:
        problems.append(
            f"the compiled model called no op of torch_gru_fuse: its GRU was not rewritten (backend={report.backend!r}). "
            f"Only the backends {' and '.join(REWRITING)} rewrite; the rewrites above give their reasons."
        )
    for c in report.comparisons:
        if not c.agrees:
            problems.append(
                f"eager and compiled disagree: {c.name} is {c.compiled:.1e} from float64 when compiled and {c.eager:.1e} "
                f"in eager, expected at most {c.limit:.1e}. Please report it with the output of this command."
            )
    eager, compiled = report.runs
    if not abs(eager.accuracy - compiled.accuracy) <= ACCURACY_LIMIT:
        problems.append(
            f"eager and compiled disagree: the accuracy on held-out files is {eager.accuracy:.3f} in eager and "
            f"{compiled.accuracy:.3f} compiled, expected a difference of at most {ACCURACY_LIMIT}. Please report it with "
            "the output of this command."
        )
    return problems


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not a positive number")
    return value


def _device(name: str | None) -> torch.device:
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # AssertionError: torch built without CUDA
        reason = str(error).splitlines()[0].rstrip(".")
        raise DemoError(f"--device {name}: {reason}. Pass a device of this machine, for example --device cpu.") from error
    return device


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return f"{device} (one thread)"


def _check_backend(backend: str, device: torch.device) -> None:
    known = torch.compiler.list_backends(exclude_tags=())
    if backend not in known:
        raise DemoError(f"--backend {backend}: expected one of {', '.join(known)}.")
    if device.type == "cpu" and backend in REWRITING:
        from torch._inductor import cpp_builder, exc

        try:
            cpp_builder.get_cpp_compiler()
        except exc.InvalidCxxCompiler as error:
            raise DemoError(_NO_COMPILER) from error


_NO_COMPILER = (
    "torch.compile needs a C++ compiler for the CPU, and found none. Install one (Debian, Ubuntu: apt install g++; "
    "Fedora: dnf install gcc-c++; conda: conda install cxx-compiler), or name yours in the environment variable CXX."
)


def _explain(error: Exception, backend: str, device: torch.device) -> str:
    text = f"{type(error).__name__}: {error}".strip()
    if "InvalidCxxCompiler" in text:
        return _NO_COMPILER
    if "Failed to find C compiler" in text:  # Triton's launcher
        return "Triton needs a C compiler, and found none. Install one (Debian, Ubuntu: apt install gcc), or set CC to yours."
    if backend not in REWRITING:
        return f"the backend {backend!r} failed, and would not rewrite the GRU. Use {' or '.join(REWRITING)}. It said: {text}"
    if "Python.h" in text:
        return "torch.compile needs Python's header files. Install them (Debian, Ubuntu: apt install python3-dev)."
    return f"training the model, compiled by the backend {backend!r}, on {device} failed: {text}"


def _clock(device: torch.device) -> float:
    """Seconds, once all that was launched on the device has finished."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()


def _describe(report: Report, model: nn.Module) -> str:
    return "\n".join(
        [
            f"Task     the language ({', '.join(report.languages)}) of {WINDOW} bytes of source code in the torch package:",
            f"         {report.steps * BATCH} windows of {report.train_files} files to learn from, "
            f"{HELD_OUT} of {report.held_out_files} other files to evaluate",
            f"Model    Embedding -> {model.gru} -> Linear, {sum(p.numel() for p in model.parameters())} parameters",
            f"Device   {report.device}, torch {torch.__version__}, backend {report.backend}",
        ]
    )


def _format(report: Report) -> str:
    eager, compiled = report.runs
    scores, *gradients = report.comparisons
    worst = max(gradients, key=lambda c: (not c.agrees, c.compiled))
    rows = [
        ("", eager.name, compiled.name),
        ("held-out accuracy", f"{eager.accuracy:.3f}", f"{compiled.accuracy:.3f}"),
        ("last training loss", f"{eager.final_loss:.5f}", f"{compiled.final_loss:.5f}"),
        ("scores, error against float64", f"{scores.eager:.1e}", f"{scores.compiled:.1e}"),
        (f"gradients, largest ({worst.name[2:]})", f"{worst.eager:.1e}", f"{worst.compiled:.1e}"),
        ("first step and compiling, s", f"{eager.compile_s:.2f}", f"{compiled.compile_s:.2f}"),
        ("one training step, ms", f"{eager.step_s * 1e3:.2f}", f"{compiled.step_s * 1e3:.2f}"),
        (f"training, {report.steps} steps, s", f"{eager.train_s:.2f}", f"{compiled.train_s:.2f}"),
        (f"evaluation, {HELD_OUT} windows, s", f"{eager.evaluate_s:.2f}", f"{compiled.evaluate_s:.2f}"),
    ]
    width = max(len(row[0]) for row in rows)
    calls = ", ".join(f"{name} x{count}" for name, count in report.fused_calls.items()) or "none"
    # A graph for training, one for evaluation: the same call is found in each.
    found = Counter(report.rewrites).items()
    lines = [f"Rewrite  {text} (in {n} graph{'s' * (n > 1)})" for text, n in found] or [
        "Rewrite  none recorded in this process"
    ]
    lines.append(f"Calls    in one training step: {calls}")
    if report.device.startswith("cpu"):
        lines.append("Note     on a CPU the ops run PyTorch's own GRU: expect its times; the fused kernels are for GPUs")
    lines.append("")
    lines += [f"{label:<{width}}  {a:>10}  {b:>10}" for label, a, b in rows]
    lines.append("")
    lines.append("Eager and compiled disagree." if report.problems else "Eager and compiled agree.")
    return "\n".join(lines)
