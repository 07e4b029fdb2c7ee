"""The project's commands: `python -m fast --help`."""

from __future__ import annotations

import argparse
import contextlib
import importlib
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import torch

from . import watch
from .bench import devices as bench_devices
from .bench import report as bench_report
from .files import atomic_write, check_writable
from .inputs import MOST, check_count
from .machine import keep_memory
from .model import CoMeTModel
from .tasks import passkey, passkey_report, passkey_training

MISTAKES = (
    ArithmeticError,
    BrokenProcessPool,
    ImportError,
    MemoryError,
    OSError,
    ValueError,
)
"""What is told in a sentence: what a user gave, or what the machine lacks."""


def main(arguments: list[str] | None = None) -> None:
    """Run one command.

    Args:
        arguments: words of the command line; None is the process's own.

    Raises:
        SystemExit: with status 2 and one sentence, the command line is wrong, a file does not fit,
            or something that the command needs is not there.
    """
    parser = _parser()
    args = parser.parse_args(arguments)
    missing = [name for name in _needed(args) if not _is_installed(name)]
    if missing:
        parser.exit(
            2,
            f"This command needs {' and '.join(missing)}; run "
            'pip install "comet-memory[commands]" first.\n',
        )
    if args.command == "bench" and args.device == "cpu" and args.page is not None:
        parser.error("--page needs --device cuda: that page is of GPUs alone")
    try:
        _check_numbers(args)
        args.run(args)
    except MISTAKES as error:
        parser.exit(2, f"{' '.join(str(error).split())}\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m fast", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    demo = commands.add_parser("demo", help="find pass keys in texts up to a million bytes")
    demo.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder of the pictures")
    demo.add_argument("--lengths", type=int, nargs="+", default=list(passkey_report.LENGTHS))
    demo.set_defaults(run=_demo)

    measure = commands.add_parser("eval", help="measure a task")
    measure.add_argument("task", choices=["passkey"])
    measure.add_argument("--variant", choices=passkey.VARIANTS, default="published")
    measure.add_argument("--lengths", type=int, nargs="+", default=list(passkey_report.LENGTHS))
    measure.add_argument("--keys", type=int, default=5, help="keys a depth")
    measure.add_argument("--tails", action="store_true", help="shorten texts at random, so that "
                         "the last chunk has any size")  # fmt: skip
    measure.add_argument("--seed", type=int, default=1)
    measure.add_argument("--model", help="a checkpoint's folder (default: the shipped model)")
    measure.add_argument("--engine", choices=["cupy", "numpy"], help="run on the engine, on "
                         "arrays of that library (default: PyTorch)")  # fmt: skip
    measure.add_argument("--haystack", help="a text file (default: the built-in text)")
    measure.add_argument("--out", type=Path, help="folder for results and pictures")
    measure.set_defaults(run=_measure)

    bench = commands.add_parser("bench", help="measure speed and memory, side by side")
    bench.add_argument("--out", type=Path, default=Path("runs/bench"), help="folder of the results")
    bench.add_argument("--device", choices=["cuda", "cpu"], help="the engine beside PyTorch, on a "
                       "GPU, or a few rows on the CPU (default: PyTorch alone)")  # fmt: skip
    bench.add_argument("--quick", action="store_true", help="a few rows, in minutes")
    bench.add_argument("--page", type=Path, help="a Markdown page to put tables and pictures into")
    bench.set_defaults(run=_bench)

    train = commands.add_parser("train", help="train a model; goes on where it stopped")
    train.add_argument("task", choices=["passkey"])
    train.add_argument("--out", type=Path, default=Path("runs/passkey"), help="folder of the run")
    train.add_argument("--seed", type=int, default=0)
    train.add_argument("--threads", type=int, help="threads to compute with (default: all)")
    train.set_defaults(run=_train)

    watching = commands.add_parser("watch", help="watch a model read a file, chunk by chunk",
                                   description=watch.COMMAND)  # fmt: skip
    watching.add_argument("file", type=Path, metavar="FILE", help="the text, of any bytes")
    watching.add_argument("--model", metavar="FOLDER", help="a checkpoint of a model that reads "
                          "bytes (default: the shipped pass-key model)")  # fmt: skip
    watching.add_argument("--chunks", type=int, default=300, metavar="N", help="read at most N "
                          "chunks of the file (default: %(default)s)")  # fmt: skip
    watching.add_argument("--answer", type=int, default=8, metavar="N", help="let the model go on "
                          "by at most N bytes, where the text is read to its end (default: "
                          "%(default)s)")  # fmt: skip
    watching.add_argument("--highlight", default=watch.HIGHLIGHT, metavar="PATTERN", help="regular "
                          "expression of what to highlight (default: %(default)s)")  # fmt: skip
    place = watching.add_mutually_exclusive_group()
    place.add_argument("--port", type=int, default=8000, help="of 127.0.0.1, to serve the page "
                       "on; 0 is any free one (default: %(default)s)")  # fmt: skip
    place.add_argument("--html", type=Path, metavar="PAGE", help="write the page to this file "
                       "instead of serving it")  # fmt: skip
    watching.set_defaults(run=_watch)
    for command in (demo, measure):
        command.add_argument("--processes", type=int, help="processes of one thread each to share "
                             "the depths among (default: one a core)")  # fmt: skip
    return parser


NUMBERS = {
    "lengths": (1, MOST),
    "keys": (1, MOST),
    "seed": (0, MOST),
    "processes": (1, MOST),
    "threads": (1, 1024),
    "chunks": (1, MOST),
    "answer": (0, MOST),
}
"""Options that are integers: the least and the most."""


def _check_numbers(args: argparse.Namespace) -> None:
    """Raise ValueError where a number is out of range, before anything is read or measured."""
    for name, (least, most) in NUMBERS.items():
        value = getattr(args, name, None)
        for number in value if isinstance(value, list) else [value]:
            if number is not None:
                check_count(f"--{name}", number, least, most)


def _needed(args: argparse.Namespace) -> list[str]:
    """Packages of the extra `commands` that a command uses, matplotlib only where it draws."""
    if args.command == "watch":
        return []
    draws = (
        args.command == "demo"
        or (args.command == "eval" and args.out is not None)
        or (args.command == "bench" and args.page is not None and args.device is None)
    )
    return ["tqdm", "matplotlib"] if draws else ["tqdm"]


def _is_installed(package: str) -> bool:
    try:
        importlib.import_module(package)
    except ImportError:
        return False
    return True


def _demo(args: argparse.Namespace) -> None:
    passkey_report.check(args.lengths, passkey_report.Setting(), args.out, "demo")
    passkey_report.demo(args.out, args.lengths, args.processes)


def _measure(args: argparse.Namespace) -> None:
    setting = passkey_report.Setting(
        args.variant,
        args.keys,
        args.tails,
        args.seed,
        args.processes,
        args.model,
        args.engine,
        args.haystack,
    )
    file = None if args.out is None else args.out / f"{args.variant}.json"
    passkey_report.check(args.lengths, setting, args.out, args.variant)
    results = passkey_report.collect(args.lengths, setting, file)
    print(f"\n{passkey_report.table(results, args.variant)}")
    print(f"\n{passkey_report.footer(setting)}")
    if args.out is not None:
        for path in passkey_report.draw(results, args.variant, args.out):
            print(f"wrote {path}")


def _bench(args: argparse.Namespace) -> None:
    if args.device is not None:
        bench_devices.check_device(args.device)
    folder = args.out.joinpath(args.device or "", "quick" if args.quick else "")
    jobs = bench_report.choose(args.device, args.quick)
    bench_report.check(folder, args.page, jobs)
    timed = bench_report.run(folder, jobs)
    for section in bench_report.tables(timed).values():
        print(f"\n{section}")
    print(f"\n{bench_report.footer(args.device)}")
    if args.page is not None:
        bench_report.fill(args.page, timed)


def _watch(args: argparse.Namespace) -> None:
    if args.model is None:
        torch.set_num_threads(1)  # the shipped model is tiny: a second thread only costs

    def document() -> str:
        return watch.watch(
            CoMeTModel.from_pretrained(args.model or passkey.SHIPPED),
            args.file,
            chunks=args.chunks,
            answer=args.answer,
            highlight=args.highlight,
        )

    if args.html is not None:
        check_writable(args.html)
        atomic_write(args.html, document())
        print(f"wrote {args.html}")
        return
    with watch.PageServer(args.port) as server:  # a port that is taken is told before the reading
        server.document = document().encode()
        print(f"http://{watch.HOST}:{server.server_port}/ until Ctrl+C", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            server.serve_forever()


def _train(args: argparse.Namespace) -> None:
    passkey_training.check(args.out)
    keep_memory()
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    print(f"wrote {passkey_training.train(args.out, args.seed)}")


if __name__ == "__main__":
    main()
