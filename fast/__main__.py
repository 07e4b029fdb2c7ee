"""The project's commands: `python -m fast --help`."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib
import json
import os
import unicodedata
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import torch

from reference.config import MemoryConfig

from . import reading, watch
from . import train as training
from .bench import devices as bench_devices
from .bench import pretrained as bench_pretrained
from .bench import report as bench_report
from .bench import starts
from .files import atomic_write, check_writable
from .inputs import MOST, check_choice, check_count
from .machine import keep_memory, machine, threads
from .model import CoMeTModel
from .tasks import (
    harness,
    memories,
    memories_report,
    passkey,
    passkey_diagnosis,
    passkey_keeping,
    passkey_recipe,
    passkey_report,
    questions,
    readers,
)
from .tasks.evaluations import EVALUATIONS
from .tasks.passkey_keeping import KeepingKeys
from .tasks.passkey_training import PassKey
from .tasks.text import Text
from .train import report as training_report

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
    if args.command == "bench" and args.what is None and args.simulate:
        parser.error("--simulate is of `bench pipeline`")
    if args.command == "bench" and args.section is not None and args.device is not None:
        parser.error("--section is of the page without --device")
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

    tasks = commands.add_parser("eval", help="measure a task").add_subparsers(
        dest="task", required=True
    )
    measure = tasks.add_parser("passkey", help="find pass keys in texts of bytes")
    measure.add_argument("--variant", choices=passkey.VARIANTS, default="published")
    measure.add_argument("--lengths", type=int, nargs="+", default=list(passkey_report.LENGTHS))
    measure.add_argument("--keys", type=int, default=5, help="keys a depth")
    measure.add_argument("--tails", action="store_true", help="shorten texts at random, so that "
                         "the last chunk has any size")  # fmt: skip
    measure.add_argument("--seed", type=int, default=1)
    measure.add_argument("--model", help="a checkpoint's folder (default: the shipped model)")
    measure.add_argument("--engine", choices=["cupy", "numpy"], help="run on the engine, on "
                         "arrays of that library (default: PyTorch)")  # fmt: skip
    measure.add_argument(
        "--dtype", choices=reading.DTYPES, help="to compute in (default: the model's)"
    )
    measure.add_argument("--haystack", help="a text file (default: the built-in text)")
    measure.add_argument("--out", type=Path, help="folder for results and pictures")
    measure.add_argument("--diagnose", action="store_true", help="instead, tell what writes to the "
                         "memory in prose without a key, and whether late keys get in; takes --model, "
                         "--haystack, --seed and --out alone")  # fmt: skip
    measure.set_defaults(run=_measure)
    compare = tasks.add_parser("memories", help="what trained memories are worth to a backbone",
                               description=memories_report.__doc__,
                               formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    compare.add_argument("--memories", type=Path, required=True, metavar="FILE", help="of `train "
                         "memories`; or the folder of a model that was trained whole")  # fmt: skip
    compare.add_argument("--lengths", type=int, nargs="+", default=list(
        memories_report.Setting.lengths), help="tokens of the texts with a key")  # fmt: skip
    compare.add_argument("--keys", type=int, default=memories_report.Setting.keys, help="keys a "
                         "length (default: %(default)s)")  # fmt: skip
    compare.add_argument("--windows", type=int, default=memories_report.Setting.windows,
                         metavar="N", help="texts of prose (default: %(default)s)")  # fmt: skip
    compare.add_argument("--out", type=Path, help="folder for results and a picture")
    compare.set_defaults(run=_compare)
    begin = tasks.add_parser("starts", help="compare how the memories of a pretrained model may start",
                             description=starts.__doc__)  # fmt: skip
    begin.add_argument("--windows", type=int, default=20, metavar="N", help="parts of the text to "
                       "read (default: %(default)s)")  # fmt: skip
    begin.set_defaults(run=_starts)

    for name, kind in EVALUATIONS.items():
        _add_evaluation(tasks, name, kind)

    bench = commands.add_parser("bench", help="measure speed and memory, side by side")
    bench.add_argument("what", nargs="?", choices=["pipeline"], help="instead, training steps that "
                       "two worker processes share")  # fmt: skip
    bench.add_argument("--simulate", action="store_true", help="of `pipeline`: also the times that "
                       "its costs make likely with up to 1,024 workers")  # fmt: skip
    bench.add_argument("--out", type=Path, default=Path("runs/bench"), help="folder of the results")
    bench.add_argument("--device", choices=["cuda", "cpu"], help="the engine beside PyTorch, on a "
                       "GPU, or a few rows on the CPU (default: PyTorch alone)")  # fmt: skip
    bench.add_argument("--quick", action="store_true", help="a few rows, in minutes")
    bench.add_argument("--section", choices=sorted(bench_report.CPU_SECTIONS), help="measure this "
                       "part of the page alone")  # fmt: skip
    bench.add_argument("--page", type=Path, help="a Markdown page to put tables and pictures into")
    bench.add_argument("--backbone", type=Path, metavar="SOURCE", help="instead, a pretrained model's "
                       "folder or GGUF file, with memories, beside itself in transformers")  # fmt: skip
    bench.add_argument("--dtype", choices=reading.DTYPES, default="float32", help="of that backbone "
                       "(default: %(default)s)")  # fmt: skip
    bench.set_defaults(run=_bench)

    tasks = commands.add_parser(
        "train", help="train a model; goes on where it stopped"
    ).add_subparsers(dest="task", required=True)
    train = tasks.add_parser("passkey", help="the byte-level model that finds pass keys")
    keep = tasks.add_parser("keeping", help="its last stage: keep keys in long prose")
    learn = tasks.add_parser("text", help="any model, on text or chats of your own")
    learn.add_argument("--chat", nargs="+", metavar="FILE", help="chats, a line of JSON each")
    adapt = tasks.add_parser("memories", help="the memories of a pretrained backbone")
    ask = tasks.add_parser("questions", help="a model, or a baseline, on a task of `eval`")
    recipes = {
        train: passkey_recipe.RECIPE,
        keep: passkey_keeping.RECIPE,
        learn: None,
        adapt: memories.RECIPE,
        ask: None,
    }
    for command, recipe in recipes.items():
        command.add_argument("--settings", type=Path, default=recipe, metavar="FILE", help="TOML: "
                             "fields of fast.train.Settings (default: "
                             f"{recipe.name if recipe else 'their defaults'})")  # fmt: skip
        command.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE", help="settings in "
                             "place of the file's, such as batch_size=4 or phases.0.steps=100")  # fmt: skip
        out = Path("runs") / command.prog.rpartition(" ")[2]
        command.add_argument("--out", type=Path, default=out, help="folder of the run (default: "
                             "%(default)s)")  # fmt: skip
        command.add_argument("--seed", type=int, help="in place of the settings'")
        command.add_argument("--threads", type=int, help="threads to compute with (default: all)")
        command.set_defaults(run=_train)
    keep.add_argument("--model", metavar="FOLDER", default=str(passkey.SHIPPED), help="the model to "
                      "start from (default: the shipped one, which has had this stage)")  # fmt: skip
    for command in (learn, adapt):
        command.add_argument("--text", nargs="+", metavar="FILE", help="plain text, UTF-8; the last "
                             "tenth of each is held out")  # fmt: skip
        start = command.add_mutually_exclusive_group()
        start.add_argument("--backbone", metavar="SOURCE", help="a pretrained model's folder or GGUF "
                           "file to start from, with fresh memories")  # fmt: skip
        start.add_argument(
            "--model", metavar="FOLDER", help="a checkpoint of CoMeT's to start from"
        )
    ask.add_argument("--model", metavar="FOLDER", help="a checkpoint to start from (default: a fresh "
                     "model)")  # fmt: skip
    for command in (compare, begin):
        command.add_argument("--backbone", type=Path, required=True, metavar="SOURCE", help="a "
                             "pretrained model's folder or GGUF file, with its tokenizer")  # fmt: skip
    compare.add_argument("--text", type=Path, nargs="+", required=True, metavar="FILE", help="plain "
                         "text, UTF-8; the last tenth of each is read")  # fmt: skip
    begin.add_argument("--text", type=Path, required=True, metavar="FILE", help="plain text, UTF-8")

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
    _add_reading(commands)
    for command in (demo, measure):
        command.add_argument("--processes", type=int, help="processes of one thread each to share "
                             "the depths among (default: one a core)")  # fmt: skip
    return parser


def _add_evaluation(tasks: Any, name: str, kind: Any) -> None:
    """A task of the harness."""
    told = " ".join((kind.__doc__ or "").split())
    known = ", ".join(f"{option.name}={option.default}" for option in dataclasses.fields(kind))
    command = tasks.add_parser(name, help=told.partition(". ")[0], description=told)
    _add_source(command)
    defaults = harness.Setting
    command.add_argument("--lengths", type=int, nargs="+", default=list(defaults.lengths),
                         metavar="N", help="tokens of the texts (default: %(default)s)")  # fmt: skip
    command.add_argument("--samples", type=int, default=defaults.samples, metavar="N", help="texts of "
                         "each length (default: %(default)s)")  # fmt: skip
    command.add_argument("--batch-size", type=int, default=defaults.batch_size, metavar="N",
                         help="texts read side by side (default: %(default)s)")  # fmt: skip
    command.add_argument("--texts-seed", type=int, default=defaults.seed, metavar="N", help="of the "
                         "texts (default: %(default)s)")  # fmt: skip
    command.add_argument("--reader", choices=readers.READERS, default=defaults.reader, help="with "
                         "its memories, or the backbone alone: full attention, or a sliding window "
                         "(default: %(default)s)")  # fmt: skip
    command.add_argument("--budget", type=int, metavar="BYTES", help="of a window's keys and values "
                         "(default: as many as the memories' state takes)")  # fmt: skip
    command.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE", help="options of the "
                         f"task: {known}")  # fmt: skip
    command.add_argument("--out", type=Path, help="folder for the answers and a picture; a run that "
                         "was stopped goes on from there")  # fmt: skip
    command.set_defaults(run=_evaluate)


SIZES = ("chunk_size", "global_memory_size", "temporary_memory_size", "compression_stride")
"""Fields of a `MemoryConfig` that are options."""


def _add_sizes(command: argparse.ArgumentParser, memory: MemoryConfig) -> None:
    """Options for the sizes of a backbone's memories."""
    for name in SIZES:
        flag, default = "--" + name.replace("_", "-"), getattr(memory, name)
        command.add_argument(flag, type=int, metavar="N", help=f"of a backbone's memories (default: "
                             f"{default})")  # fmt: skip


def _memory(args: argparse.Namespace, memory: MemoryConfig) -> MemoryConfig:
    """The memories with the sizes that options give."""
    given = {name: getattr(args, name) for name in SIZES if getattr(args, name) is not None}
    return dataclasses.replace(memory, **given)


def _add_model(command: argparse.ArgumentParser, moved: str = "") -> None:
    """Options for a model that is there: required, unless something else tells of it."""
    kind = command.add_mutually_exclusive_group(required=not moved)
    kind.add_argument("--backbone", metavar="SOURCE", help="a pretrained model's folder or GGUF "
                      f"file{moved}")  # fmt: skip
    kind.add_argument("--model", metavar="FOLDER", help="a checkpoint of CoMeT's, with its "
                      f"tokenizer{moved}")  # fmt: skip


def _add_source(command: argparse.ArgumentParser) -> None:
    """Options for what reads: see `_source`."""
    _add_model(command)
    _add_sizes(command, reading.MEMORY)
    command.add_argument("--memories", metavar="FILE", help="a backbone's memories, of `train "
                         "memories` (default: fresh ones)")  # fmt: skip
    command.add_argument("--seed", type=int, help="of a backbone's memories (default: 0)")
    command.add_argument("--dtype", choices=reading.DTYPES, help="to read in (default: the files')")


def _add_reading(commands: Any) -> None:
    """The commands that read a document and answer questions about it."""
    read = commands.add_parser("read", help="read a document into a state; goes on where it "
                               "stopped")  # fmt: skip
    read.add_argument("document", type=Path, metavar="DOCUMENT", help="a text, UTF-8")
    read.add_argument("--save", type=Path, metavar="STATE", required=True, help="file of the state "
                      "and of the place in the document; saved every minute")  # fmt: skip
    _add_source(read)
    read.add_argument("--loss", action="store_true", help="predict every token too, for the table")
    read.add_argument("--report", type=Path, metavar="FILE", help="write the table's numbers to "
                      "this file, as JSON")  # fmt: skip
    read.set_defaults(run=_read)

    ask = commands.add_parser("ask", help="ask about what a state has read")
    ask.add_argument("state", type=Path, metavar="STATE", help="of `read`; it stays as it is")
    ask.add_argument("question", metavar="QUESTION")
    ask.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="of the answer, "
                     "at most (default: %(default)s)")  # fmt: skip
    ask.add_argument("--temperature", type=float, default=0.0, metavar="T", help="above 0 draws "
                     "from softmax(logits / T) (default: the likeliest token)")  # fmt: skip
    ask.add_argument("--seed", type=int, default=0, help="of the draws (default: 0)")
    ask.add_argument("--save", type=Path, metavar="STATE", help="file of the state after the answer, "
                     "to go on with (default: none)")  # fmt: skip
    ask.set_defaults(run=_ask)
    _add_model(ask, ", where it has moved")


NUMBERS = {
    "lengths": (1, MOST),
    "keys": (1, MOST),
    "seed": (0, MOST),
    "processes": (1, MOST),
    "threads": (1, 1024),
    "chunks": (1, MOST),
    "answer": (0, MOST),
    "max_new_tokens": (1, MOST),
    "windows": (1, MOST),
    "samples": (1, MOST),
    "batch_size": (1, MOST),
    "texts_seed": (0, MOST),
    "budget": (1, MOST),
}
"""Options that are integers: the least and the most."""


def _check_numbers(args: argparse.Namespace) -> None:
    """Raise ValueError where a number is out of range, before anything is read or measured."""
    for name, (least, most) in NUMBERS.items():
        value = getattr(args, name, None)
        for number in value if isinstance(value, list) else [value]:
            if number is not None:
                check_count(f"--{name.replace('_', '-')}", number, least, most)


def _needed(args: argparse.Namespace) -> list[str]:
    """Packages of the extra `commands` that a command uses, matplotlib only where it draws."""
    if args.command in ("watch", "ask") or getattr(args, "task", None) == "starts":
        return []
    draws = (
        args.command == "demo"
        or args.command == "train"
        or (args.command == "eval" and args.out is not None)
        or (
            args.command == "bench"
            and args.page is not None
            and args.device is None
            and args.what is None
        )
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


def _diagnose(args: argparse.Namespace) -> None:
    setting = passkey_diagnosis.Setting(model=args.model, haystack=args.haystack, seed=args.seed)
    files = [] if args.out is None else [args.out / f"diagnosis.{kind}" for kind in ("json", "png")]
    for file in files:
        check_writable(file)
    keep_memory()
    found = passkey_diagnosis.diagnose(setting)
    print(f"\n{passkey_diagnosis.table(found)}\n\n{machine(threads())}")
    if files:
        passkey_diagnosis.save(found, files[0])
        print(f"wrote {files[0]}\nwrote {passkey_diagnosis.draw(found, files[1])}")


def _measure(args: argparse.Namespace) -> None:
    if args.diagnose:
        _diagnose(args)
        return
    setting = passkey_report.Setting(
        args.variant,
        args.keys,
        args.tails,
        args.seed,
        args.processes,
        args.model,
        args.engine,
        args.haystack,
        args.dtype,
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
    if args.what == "pipeline":
        from .bench import pipeline as bench_pipeline  # PyTorch's meshes take half a second

        bench_pipeline.run(args.out, args.quick, args.simulate, args.page)
        return
    if args.backbone is not None:
        keep_memory()
        sizes: dict[str, Any] = {"length": 2048, "new": 16, "rounds": 1} if args.quick else {}
        dtype = getattr(torch, args.dtype)
        found = bench_pretrained.measure(args.backbone, dtype=dtype, **sizes)
        print(f"\n{bench_pretrained.table(found)}\n\n{machine(threads())}")
        return
    if args.device is not None:
        bench_devices.check_device(args.device)
    folder = args.out.joinpath(args.device or "", "quick" if args.quick else "")
    jobs = bench_report.choose(args.device, args.quick, args.section)
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


def _evaluate(args: argparse.Namespace) -> None:
    source, options = _source(args), dict[str, Any]()
    for change in args.set:
        training.put(options, change)
    task = training.fit(EVALUATIONS[args.task], options, "--set")
    setting = harness.Setting(
        args.task,
        source.path,
        dataclasses.asdict(task),
        tuple(args.lengths),
        args.samples,
        args.batch_size,
        args.texts_seed,
        args.reader,
        args.budget,
    )
    files = (
        [None, None]
        if args.out is None
        else [args.out / f"{args.task}.{x}" for x in ("jsonl", "png")]
    )
    for file in files:
        if file is not None:
            check_writable(file)
    keep_memory()
    model, words = readers.open_model(source)
    reader = readers.open_reader(args.reader, model, args.budget)
    scored = harness.evaluate(task, setting, reader, words, files[0], model.device)
    print(f"\n{harness.table(scored)}\n\n{machine(threads())}")
    if files[1] is not None:
        print(f"wrote {files[0]}\nwrote {harness.draw(scored, args.task, files[1])}")


def _starts(args: argparse.Namespace) -> None:
    results = []
    for result in starts.measure_starts(args.backbone, args.text, args.windows):
        results.append(result)
        print(starts.table(results).splitlines()[-1], flush=True)
    print(f"\n{starts.table(results)}\n\n{machine(threads())}")


TASKS: dict[str, type[training.Task]] = {
    "keeping": KeepingKeys,
    "memories": memories.Memories,
    "passkey": PassKey,
    "questions": questions.Questions,
    "text": Text,
}
"""What the trainer trains on, by name."""


def _train(args: argparse.Namespace) -> None:
    given = {
        name: getattr(args, name, None) for name in ("text", "chat", "model", "backbone", "seed")
    }
    if given["model"] is not None:
        given["memory"] = {}  # a checkpoint has its own
    settings = training.read_settings(args.settings, args.set, task=args.task, **given)
    check_choice("task", settings.task, sorted(TASKS))
    check_writable(args.out / "metrics.jsonl")
    keep_memory()
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    with training.Processes.joined(settings) as processes:
        model = training.build_model(settings)
        trainer = training.Trainer(TASKS[settings.task](settings, model, processes), args.out)
        trainer.run()
        if processes.rank:
            return
        metrics = trainer.read_metrics()
        print(f"\n{training_report.table(metrics)}\n\n{machine(threads())}\nwrote {trainer.result}")
        print(f"wrote {training_report.draw(metrics, args.out / 'metrics.png')}")


def _compare(args: argparse.Namespace) -> None:
    setting = memories_report.Setting(
        str(args.backbone),
        str(args.memories),
        tuple(map(str, args.text)),
        windows=args.windows,
        lengths=tuple(args.lengths),
        keys=args.keys,
    )
    for name in () if args.out is None else ("memories.json", "memories.png"):
        check_writable(args.out / name)
    keep_memory()
    results = memories_report.measure(setting)
    print(f"\n{memories_report.table(results, setting)}\n\n{machine(threads())}")
    if args.out is not None:
        memories_report.save(results, setting, args.out / "memories.json")
        print(f"wrote {memories_report.draw(results, setting, args.out / 'memories.png')}")


def _source(args: argparse.Namespace) -> reading.Source:
    """The model that options name."""
    own = [name for name in (*SIZES, "seed") if getattr(args, name) is not None]
    given = "--model" if args.model is not None else "--memories" if args.memories else None
    if given is not None and own:
        flags = ", ".join(f"--{option}" for option in own).replace("_", "-")
        raise ValueError(f"{flags}: of fresh memories; what {given} names has its own.")
    if args.model is not None and args.memories is not None:
        raise ValueError("--memories: of a backbone; what --model names has its own.")
    memory: MemoryConfig | str | None = None
    if args.memories is not None:
        memory = os.path.abspath(args.memories)
    elif args.model is None:
        memory = _memory(args, reading.MEMORY)
    path = os.path.abspath(args.backbone if args.model is None else args.model)
    return reading.Source(path, memory, args.seed or 0, args.dtype)


def _read(args: argparse.Namespace) -> None:
    source = _source(args)
    if args.report is not None:
        check_writable(args.report)
    marks = reading.read_document(args.document, source, args.save, loss=args.loss)
    how = machine(threads())
    print(f"\n{reading.table(marks)}\n\n{how}\nwrote {args.save}")
    if args.report is not None:
        report = {
            "source": dataclasses.asdict(source),
            "machine": how,
            "marks": [dataclasses.asdict(mark) for mark in marks],
        }
        atomic_write(args.report, json.dumps(report, indent=2) + "\n")
        print(f"wrote {args.report}")


def _ask(args: argparse.Namespace) -> None:
    source = None
    if args.model is not None:
        source = reading.Source(os.path.abspath(args.model))
    elif args.backbone is not None:
        source = reading.noted_source(args.state)
        if source is None or source.memory is None:
            raise ValueError(
                f"{args.state} tells of no backbone's memories; give the model that read it by "
                "--model FOLDER."
            )
        source = dataclasses.replace(source, path=os.path.abspath(args.backbone))

    def write(part: str) -> None:
        # A control character could do anything to a terminal.
        plain = (c if c in "\n\t" or unicodedata.category(c) != "Cc" else "\ufffd" for c in part)
        print("".join(plain), end="", flush=True)

    reading.ask(
        args.state,
        args.question,
        source,
        write,
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        seed=args.seed,
        save=args.save,
    )
    print()


if __name__ == "__main__":
    main()
