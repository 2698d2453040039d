"""Train a GRU to write Python: the next character of the standard library's source code, eager and compiled, side by side.

    python examples/train_next_character.py
    python examples/train_next_character.py --amp float16 --plot curves.png

The model is one as anybody would write it, and `torch_gru_fuse` shows in two lines, which are marked.  Both trainings start
from the same weights, see the same batches, and are evaluated on the same files, none of which is trained on.  Their curves are
the same but for rounding and, on a GPU, for dropout, whose random numbers are not cuDNN's (`--dropout 0` leaves rounding).
Times are those of training steps, without compiling and evaluation.

Exit status: 0 when both reach the same accuracy, else 1.
"""

import argparse
import copy
import json
import sys
import sysconfig
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.hub import tqdm  # the real one where it is installed, else a plain counter

import torch_gru_fuse

CHARACTERS = 128  # ASCII
#: On a GPU, on a CPU.
DEFAULTS = {"steps": (3000, 300), "length": (256, 64), "batch": (64, 32), "hidden": (512, 128), "evaluate": (100, 50)}
EVALUATION = 16  # batches
# Accuracy on the held-out files at the end: trainings with other dropout differ by a few thousandths.
ACCURACY_LIMIT = 0.015


# ---- the model ----------------------------------------------------------------------------------------------------------


class NextCharacter(nn.Module):
    """text [B, T] -> scores of each next character [B, T, CHARACTERS]"""

    def __init__(self, hidden: int, layers: int, dropout: float):
        super().__init__()
        self.embedding = nn.Embedding(CHARACTERS, hidden)
        self.gru = nn.GRU(hidden, hidden, layers, batch_first=True, dropout=dropout)
        self.head = nn.Linear(hidden, CHARACTERS)

    def forward(self, text: Tensor) -> Tensor:
        states, _ = self.gru(self.embedding(text))
        return self.head(states)


# ---- the text -----------------------------------------------------------------------------------------------------------


@dataclass
class Text:
    """All characters of some files, one file after the other, on a device."""

    characters: Tensor
    files: int

    def windows(self, count: int, length: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Pieces of it at random places [count, length], and the same one character later."""
        starts = torch.randint(len(self.characters) - length, (count, 1), generator=generator)
        places = (starts + torch.arange(length + 1)).to(self.characters.device)
        text = self.characters[places]
        return text[:, :-1], text[:, 1:]


def load(folder: Path, device: torch.device, length: int) -> tuple[Text, Text]:
    """The Python files of a folder: nine in ten to train on, the others held out."""
    files = sorted(folder.glob("*.py"))
    parts = []
    for chosen in ([f for i, f in enumerate(files) if i % 10], files[::10]):
        text = "".join(f.read_text(encoding="utf-8", errors="replace") for f in chosen).encode("ascii", "replace")
        if len(text) <= length:
            sys.exit(f"--text {folder}: its *.py files hold too little for windows of {length} characters; pass another folder")
        parts.append(Text(torch.frombuffer(bytearray(text), dtype=torch.uint8).to(device, torch.int64), len(chosen)))
    return parts[0], parts[1]


# ---- training -----------------------------------------------------------------------------------------------------------


@dataclass
class Run:
    """One training. The lists have an entry for each evaluation."""

    name: str
    first_s: float = 0.0  # first step and first evaluation, compiling included
    steps: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)  # of training so far
    losses: list[float] = field(default_factory=list)  # on held-out files, in bits a character
    accuracies: list[float] = field(default_factory=list)

    @property
    def step_ms(self) -> float:
        return 1e3 * self.seconds[-1] / self.steps[-1]


class Trainer:
    def __init__(self, name: str, model: nn.Module, forward: nn.Module, train: Text, held_out: Text, a: argparse.Namespace):
        """Trains `model`, calling it through `forward`: itself or its compiled form."""
        self.run, self.model, self.forward, self.train, self.held_out, self.a = Run(name), model, forward, train, held_out, a
        self.device = train.characters.device
        self.amp = getattr(torch, a.amp) if a.amp else None
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.amp == torch.float16)
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=a.lr)
        warm_up = max(1, a.steps // 20)
        self.scheduler = torch.optim.lr_scheduler.SequentialLR(
            self.optimizer,
            [
                torch.optim.lr_scheduler.LinearLR(self.optimizer, 0.1, total_iters=warm_up),
                torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, max(1, a.steps - warm_up)),
            ],
            [warm_up],
        )

    def loss(self, text: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast(self.device.type, dtype=self.amp, enabled=self.amp is not None):
            scores = self.forward(text)
            return nn.functional.cross_entropy(scores.flatten(0, 1), target.flatten()), scores

    def step(self, text: Tensor, target: Tensor) -> None:
        self.optimizer.zero_grad()
        loss, _ = self.loss(text, target)
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.scheduler.step()

    @torch.no_grad()
    def evaluate(self, batches: int = EVALUATION) -> tuple[float, float]:
        """Bits a character, and the fraction of characters that have the highest score."""
        generator = torch.Generator().manual_seed(self.a.seed + 1)
        self.model.eval()
        losses, right = [], []
        for _ in range(batches):
            text, target = self.held_out.windows(self.a.batch, self.a.length, generator)
            loss, scores = self.loss(text, target)
            losses.append(loss.float())
            right.append((scores.argmax(-1) == target).float().mean())
        self.model.train()
        return torch.stack(losses).mean().item() / torch.log(torch.tensor(2.0)).item(), torch.stack(right).mean().item()

    def __call__(self) -> Run:
        a, run = self.a, self.run
        generator = torch.Generator().manual_seed(a.seed)
        begin = self.now()
        self.loss(*self.train.windows(a.batch, a.length, generator))[0].backward()  # leaves the weights as they are
        self.evaluate(1)
        run.first_s = self.now() - begin

        generator.manual_seed(a.seed)
        torch.manual_seed(a.seed)  # of dropout
        seconds, begin = 0.0, self.now()
        with tqdm(total=a.steps, unit="step", desc=run.name, disable=not sys.stderr.isatty()) as bar:
            for step in range(1, a.steps + 1):
                self.step(*self.train.windows(a.batch, a.length, generator))
                bar.update(1)
                if step % a.evaluate == 0 or step == a.steps:
                    seconds += self.now() - begin
                    loss, accuracy = self.evaluate()
                    run.steps.append(step)
                    run.seconds.append(seconds)
                    run.losses.append(loss)
                    run.accuracies.append(accuracy)
                    begin = self.now()
        return run

    def now(self) -> float:
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)
        return time.perf_counter()


def main(argv: list[str] | None = None) -> int:
    a = _arguments(argv)
    threads = torch.get_num_threads()
    # On a CPU steps this small gain little from threads, and wait for each other where something else wants the cores.
    torch.set_num_threads(1)
    try:
        return _main(a)
    finally:
        torch.set_num_threads(threads)


def _main(a: argparse.Namespace) -> int:
    device = torch.device(a.device)
    train, held_out = load(a.text, device, a.length)
    torch.manual_seed(a.seed)
    initial = NextCharacter(a.hidden, a.layers, a.dropout)
    print(_describe(initial, train, held_out, a), flush=True)

    model = copy.deepcopy(initial).to(device)
    eager = Trainer("eager", model, model, train, held_out, a)()

    torch_gru_fuse.enable()  # this line
    model = copy.deepcopy(initial).to(device)
    compiled_model = torch.compile(model, fullgraph=True)  # and this one
    compiled = Trainer("compiled", model, compiled_model, train, held_out, a)()
    torch_gru_fuse.check_errors()

    print(_table(eager, compiled))
    for record in dict.fromkeys(map(str, torch_gru_fuse.rewrites())):
        print(record)
    if a.json:
        settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(a).items()}
        record = {"settings": settings, "device": _device_name(device), "torch": torch.__version__}
        Path(a.json).write_text(json.dumps(record | {"runs": [asdict(eager), asdict(compiled)]}, indent=1) + "\n")
    if a.plot:
        _plot(eager, compiled, f"{_device_name(device)}, {a.amp or 'float32'}", a.plot)
    difference = abs(eager.accuracies[-1] - compiled.accuracies[-1])
    if not difference <= ACCURACY_LIMIT:  # nan, too
        print(f"Eager and compiled DISAGREE: their accuracies differ by {difference:.4f}, expected at most {ACCURACY_LIMIT}.")
        return 1
    print(f"Eager and compiled agree: their accuracies differ by {difference:.4f}.")
    return 0


# ---- output -------------------------------------------------------------------------------------------------------------


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU, one thread"


def _describe(model: nn.Module, train: Text, held_out: Text, a: argparse.Namespace) -> str:
    million = sum(p.numel() for p in model.parameters()) / 1e6
    return "\n".join([
        f"Text     {a.text}: {len(train.characters) / 1e6:.1f} million characters",
        f"         of {train.files} files to train on, {held_out.files} other files to evaluate",
        f"Model    Embedding -> {model.gru} -> Linear, {million:.2f} million parameters",
        f"Steps    {a.steps} of {a.batch} windows of {a.length} characters, {a.amp or 'float32'}",
        f"Device   {_device_name(torch.device(a.device))}, torch {torch.__version__}",
    ])  # fmt: skip


def _table(eager: Run, compiled: Run) -> str:
    lines = ["", f"{'step':>8}{'bits a character':>26}{'accuracy':>22}", f"{'':>8}" + f"{'eager':>15}{'compiled':>11}" * 2]
    chosen = range(len(eager.steps) - 1, -1, -max(1, len(eager.steps) // 10))
    for i in reversed(chosen):
        values = (eager.losses[i], compiled.losses[i], eager.accuracies[i], compiled.accuracies[i])
        lines.append(f"{eager.steps[i]:>8}{values[0]:>15.3f}{values[1]:>11.3f}{values[2]:>15.4f}{values[3]:>11.4f}")
    lines += ["", f"{'':<28}{'eager':>10}{'compiled':>10}"]
    lines.append(f"{'first step and compiling, s':<28}{eager.first_s:>10.2f}{compiled.first_s:>10.2f}")
    lines.append(f"{'one training step, ms':<28}{eager.step_ms:>10.2f}{compiled.step_ms:>10.2f}")
    lines.append(f"{'training, s':<28}{eager.seconds[-1]:>10.2f}{compiled.seconds[-1]:>10.2f}")
    lines.append(f"{'':<28}{'':>10}{eager.seconds[-1] / compiled.seconds[-1]:>9.2f}x")
    return "\n".join(lines) + "\n"


def _plot(eager: Run, compiled: Run, title: str, file: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (by_step, by_time) = pyplot.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    for run, style in ((eager, "--"), (compiled, "-")):
        by_step.plot(run.steps, run.accuracies, style, label=run.name)
        by_time.plot(run.seconds, run.accuracies, style, label=run.name)
    by_step.set(xlabel="step", ylabel="held-out accuracy of the next character")
    by_time.set(xlabel="seconds of training")
    for axes in (by_step, by_time):
        axes.grid(alpha=0.3)
        axes.legend()
    figure.suptitle(title)
    figure.savefig(file, dpi=120)
    pyplot.close(figure)


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    helps = {
        "steps": "of training", "length": "characters of a window", "batch": "windows of a step", "hidden": "units of a layer",
        "evaluate": "steps between evaluations",
    }  # fmt: skip
    for name, (gpu, cpu) in DEFAULTS.items():
        parser.add_argument(f"--{name}", type=_positive, help=f"{helps[name]} (default: {gpu} on a GPU, {cpu} on a CPU)")
    parser.add_argument("--layers", type=_positive, default=2, help="(default: %(default)s)")
    parser.add_argument("--dropout", type=float, default=0.1, help="between layers (default: %(default)s)")
    parser.add_argument("--lr", type=float, default=4e-3, help="highest learning rate (default: %(default)s)")
    parser.add_argument("--amp", choices=("float16", "bfloat16"), help="train under torch.autocast")
    parser.add_argument("--device", help="cuda or cpu; the GPU if there is one")
    parser.add_argument("--text", type=Path, default=Path(sysconfig.get_path("stdlib")), help="a folder of Python files")
    parser.add_argument("--seed", type=int, default=0, help="of weights, batches and dropout (default: %(default)s)")
    parser.add_argument("--json", metavar="FILE", help="write the curves")
    parser.add_argument("--plot", metavar="FILE", help="draw the curves (needs matplotlib: pip install -e '.[bench]')")
    a = parser.parse_args(argv)
    a.device = a.device or ("cuda" if torch.cuda.is_available() else "cpu")
    for name, (gpu, cpu) in DEFAULTS.items():
        if getattr(a, name) is None:
            setattr(a, name, cpu if a.device == "cpu" else gpu)
    if a.plot:
        try:
            import matplotlib  # noqa: F401  (before the training, not after it)
        except ImportError:
            parser.error("--plot needs matplotlib: pip install -e '.[bench]'")
    return a


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not a positive number")
    return value


if __name__ == "__main__":
    sys.exit(main())
