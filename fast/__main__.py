"""The project's commands: `python -m fast --help`."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from .bench import report as bench_report
from .machine import keep_memory
from .tasks import passkey, passkey_report, passkey_training


def main(arguments: list[str] | None = None) -> None:
    """Run one command.

    Args:
        arguments: words of the command line; None is the process's own.
    """
    parser = argparse.ArgumentParser(prog="python -m fast", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    demo = commands.add_parser("demo", help="find pass keys in texts up to a million bytes")
    demo.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder of the pictures")
    demo.add_argument("--lengths", type=int, nargs="+", default=list(passkey_report.LENGTHS))

    measure = commands.add_parser("eval", help="measure a task")
    measure.add_argument("task", choices=["passkey"])
    measure.add_argument("--variant", choices=passkey.VARIANTS, default="published")
    measure.add_argument("--lengths", type=int, nargs="+", default=list(passkey_report.LENGTHS))
    measure.add_argument("--keys", type=int, default=5, help="keys a depth")
    measure.add_argument("--tails", action="store_true", help="shorten texts at random, so that "
                         "the last chunk has any size")  # fmt: skip
    measure.add_argument("--seed", type=int, default=1)
    measure.add_argument("--model", help="a checkpoint's folder (default: the shipped model)")
    measure.add_argument("--haystack", help="a text file (default: the built-in text)")
    measure.add_argument("--out", type=Path, help="folder for results and pictures")

    bench = commands.add_parser("bench", help="measure speed and memory, side by side")
    bench.add_argument("--out", type=Path, default=Path("runs/bench"), help="folder of the results")
    bench.add_argument("--quick", action="store_true", help="a few rows, in minutes")
    bench.add_argument("--page", type=Path, help="a Markdown page to put tables and pictures into")

    train = commands.add_parser("train", help="train a model; goes on where it stopped")
    train.add_argument("task", choices=["passkey"])
    train.add_argument("--out", type=Path, default=Path("runs/passkey"), help="folder of the run")
    train.add_argument("--seed", type=int, default=0)
    train.add_argument("--threads", type=int, help="threads to compute with (default: all)")
    for command in (demo, measure):
        command.add_argument("--processes", type=int, help="processes of one thread each to share "
                             "the depths among (default: one a core)")  # fmt: skip
    args = parser.parse_args(arguments)

    if args.command == "demo":
        passkey_report.demo(args.out, args.lengths, args.processes)
    elif args.command == "eval":
        asked = passkey_report.Asked(
            args.variant,
            args.keys,
            args.tails,
            args.seed,
            args.processes,
            args.model,
            args.haystack,
        )
        file = None if args.out is None else args.out / f"{args.variant}.json"
        results = passkey_report.collect(args.lengths, asked, file)
        print(f"\n{passkey_report.table(results, args.variant)}")
        print(f"\n{passkey_report.footer(asked)}")
        if args.out is not None:
            for path in passkey_report.draw(results, args.variant, args.out):
                print(f"wrote {path}")
    elif args.command == "bench":
        jobs = bench_report.QUICK if args.quick else bench_report.JOBS
        timed = bench_report.run(args.out / "quick" if args.quick else args.out, jobs)
        for section in bench_report.tables(timed).values():
            print(f"\n{section}")
        print(f"\n{bench_report.footer()}")
        if args.page is not None:
            bench_report.fill(args.page, timed)
    else:
        keep_memory()
        if args.threads is not None:
            torch.set_num_threads(args.threads)
        print(f"wrote {passkey_training.train(args.out, args.seed)}")


if __name__ == "__main__":
    main()
