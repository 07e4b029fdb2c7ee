"""lm-evaluation-harness asks a model: what is answered is what the model says to each request alone."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.tasks import TaskManager
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel

from fast import BackboneConfig, CoMeTConfig, CoMeTModel, MemoryConfig
from fast.huggingface import CoMeTForCausalLM
from fast.pretrained.text import ByteText, TokenText
from fast.tasks import lm_harness, passkey
from fast.tasks.lm_harness import CoMeTLM

from .strategies import configs, even_weights, random_model, tensors
from .test_reading import trained, wrapped

pytestmark = pytest.mark.host

ROOT = Path(__file__).parent.parent

FEW = settings(max_examples=max(10, settings.default.max_examples // 4))

TEXT = "The grass is green. The sky is blue.\nThe pass key is 4711. Remember it. "

ASKED = TEXT * 9 + "\nWhat is the pass key? The pass key is"

seeds = st.integers(0, 2**16)
texts = st.text("ab \n", max_size=30)
counts = st.integers(0, 12)


def bytes_config(config):
    """The same for bytes."""
    backbone = dataclasses.replace(config.backbone, vocab_size=256)
    return dataclasses.replace(config, backbone=backbone)


SMALL = CoMeTConfig(
    BackboneConfig(
        vocab_size=450,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
    ),
    MemoryConfig(chunk_size=16, global_memory_size=2, temporary_memory_size=4),
)


def small(dtype=torch.float64):
    """A model for 450 tokens whose logits are neither all alike nor huge."""
    return CoMeTModel(SMALL, tensors(even_weights(SMALL, 0), dtype))


def ask(kind, arguments):
    return [Instance(kind, {}, one, i) for i, one in enumerate(arguments)]


def pieces_of(size):
    """Contexts are read, and continuations of two streams scored, so many tokens at a time."""
    return patch.multiple(lm_harness, PIECE=size, LOGITS=2 * size * 256)


@torch.no_grad()
def alone(model, ids, scored):
    """The log-likelihood of the last tokens of a text, all its logits made in one call, and whether each
    is the likeliest.
    """
    logits = model(torch.tensor([ids])).logits[0, :-1].double()[-scored:]
    targets = torch.tensor(ids[-scored:])
    chosen = logits.log_softmax(dim=-1).gather(1, targets[:, None])
    return float(chosen.sum()), bool((logits.argmax(dim=-1) == targets).all())


def bytes_alone(model, context, continuation):
    """As lm_eval parts them: the spaces between the two are the continuation's."""
    start, continuation = context.rstrip(), context[len(context.rstrip()) :] + continuation
    ids = list((start + continuation).encode())
    if start:
        return alone(model, ids, len(continuation))
    if not context and continuation[0] == "\n":  # it stands where the start of a text does
        return alone(model, ids, len(ids) - 1)
    return alone(model, [10, *ids], len(ids))


def assert_same(found, expected, tolerance):
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert [nats for nats, _ in found] == pytest.approx(
        [nats for nats, _ in expected], rel=tolerance, abs=tolerance
    )


@given(configs(), seeds, st.data())
def test_log_likelihoods_are_those_of_each_request_read_alone(config, seed, data):
    """However requests are batched, contexts shared and texts cut into pieces; in their order."""
    model = random_model(bytes_config(config), seed)
    contexts = data.draw(st.lists(texts, min_size=1, max_size=3))
    pairs = data.draw(
        st.lists(
            st.tuples(st.sampled_from(contexts), texts.filter(lambda text: text.strip())),
            min_size=1,
            max_size=6,
        )
    )
    expected = [bytes_alone(model, *pair) for pair in pairs]
    lm = CoMeTLM(model, batch_size=data.draw(st.integers(1, 4)))
    with pieces_of(data.draw(st.integers(1, 8))):
        found = lm.loglikelihood(ask("loglikelihood", pairs), disable_tqdm=True)
    assert_same(found, expected, 1e-9)


@given(configs(), seeds, st.lists(texts, min_size=1, max_size=5), st.integers(1, 4), seeds)
@FEW
def test_a_text_is_one_stream_without_windows(config, seed, asked, batch_size, size):
    model = random_model(bytes_config(config), seed)
    expected = [alone(model, [10, *text.encode()], len(text))[0] if text else 0.0 for text in asked]
    with pieces_of(1 + size % 8):
        found = CoMeTLM(model, batch_size=batch_size).loglikelihood_rolling(
            ask("loglikelihood_rolling", [(text,) for text in asked]), disable_tqdm=True
        )
    assert found == pytest.approx(expected, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_a_fork_goes_on_as_one_call_does_in_float32(batch_size):
    """The shipped model, over many chunks; what is asked begins anywhere in one."""
    model = passkey.load_model()
    contexts = [(TEXT * 20)[:length] for length in (1000, 1024, 1025, 127, 129)]
    pairs = [(c, x) for c in contexts for x in (" 4711.", " 4712.\n", "?", " the grass" * 20)]
    expected = [bytes_alone(model, *pair) for pair in pairs]
    with pieces_of(300):
        found = CoMeTLM(model, batch_size=batch_size).loglikelihood(
            ask("loglikelihood", pairs), disable_tqdm=True
        )
    assert_same(found, expected, 1e-5)


def test_what_the_model_would_say_itself_is_told_beside_longer_texts():
    lm = CoMeTLM(passkey.load_model(), batch_size=4)
    pairs = [(ASKED, said) for said in (" 47", " 4711.\nThe grass", " 4711.", " 4712.")]
    found = lm.loglikelihood(ask("loglikelihood", pairs), disable_tqdm=True)
    assert [greedy for _, greedy in found] == [True, False, True, False]


def test_a_context_is_read_once_whatever_is_asked_after_it():
    model, read = passkey.load_model(), []
    handle = model.register_forward_pre_hook(
        lambda _, given, named: read.append(sum(named["lengths"])), with_kwargs=True
    )
    pairs = [(TEXT * times, f" {i}") for i in range(4) for times in (9, 5)]
    CoMeTLM(model, batch_size=2).loglikelihood(ask("loglikelihood", pairs), disable_tqdm=True)
    handle.remove()
    contexts = (
        len(TEXT) * 14 - 2 * 2
    )  # without a space, which is the continuation's, and the last token
    assert sum(read) == contexts + 3 * len(pairs)


class Latin(ByteText):
    """A character for each byte, so that whatever a blank model says is text."""

    def decoder(self):
        return chr


@given(configs(), seeds, st.lists(texts, min_size=1, max_size=5), st.data())
@FEW
def test_answers_are_those_of_each_request_alone(config, seed, contexts, data):
    """Ended by strings that lie in several tokens, or by the most tokens; in their order."""
    model = random_model(bytes_config(config), seed)
    asked, expected = [], []
    for context in contexts:
        ids = torch.tensor([list(context.encode()) or [10]])
        said = "".join(map(chr, model.generate(ids, max_new_tokens=data.draw(counts)).ids[0]))
        first, length = data.draw(st.integers(0, 8)), data.draw(st.integers(0, 3))
        ends = [said[first : first + length], "not said"]
        asked.append((context, {"until": ends, "max_gen_toks": len(said)}))
        expected.append(said[: said.find(ends[0])] if ends[0] else said)
    lm = CoMeTLM(model, batch_size=data.draw(st.integers(1, 3)), words=Latin())
    with pieces_of(data.draw(st.integers(1, 8))):
        found = lm.generate_until(ask("generate_until", asked), disable_tqdm=True)
    assert found == expected


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"until": ["\n"]}, " 4711."),
        ({"until": "71"}, " 4"),
        ({"until": ["1.\n", "11"]}, " 47"),
        ({"max_gen_toks": 3, "until": []}, " 47"),
        ({"max_new_tokens": 2, "until": None, "num_beams": 1}, " 4"),
        ({"until": ["."], "do_sample": False, "temperature": 0.7}, " 4711"),
        ({"until": ["."], "do_sample": True, "temperature": 0.0, "top_k": 0}, " 4711"),
        ({"until": ["."], "temperature": 5.0, "top_k": 1}, " 4711"),
        ({"until": ["."], "do_sample": True, "top_p": 1e-9}, " 4711"),
    ],
)
def test_an_answer_ends_where_a_task_says(given, said):
    lm = CoMeTLM(passkey.load_model())
    assert lm.generate_until(ask("generate_until", [(ASKED, given)])) == [said]


def test_answers_are_drawn_as_the_model_draws_them():
    model, ids = passkey.load_model(), list(b"The sky is")
    sampling = {"temperature": 1.5, "top_k": 20, "top_p": 0.9}
    torch.manual_seed(3)
    said = bytes(model.generate(torch.tensor([ids]), max_new_tokens=30, **sampling).ids[0])
    torch.manual_seed(3)
    given = {"do_sample": True, "max_gen_toks": 30, **sampling}
    found = CoMeTLM(model).generate_until(ask("generate_until", [("The sky is", given)]))
    assert found == ["".join(map(ByteText().decoder(), said))]


def test_a_tokenizer_parts_context_and_continuation():
    """They are encoded together; without a context, the token that starts a text stands there."""
    model, tokenizer = small(), wrapped("llama3")
    lm = CoMeTLM(model, batch_size=3, words=TokenText(tokenizer))
    start = tokenizer.bos_token_id
    pairs = [
        ("The pass key", " is 4711"),
        ("The pass key ", "is 4711"),
        ("", "The sky"),
        (" ", "is"),
    ]
    pairs += [("<s>The pass key", " is 4711"), ("A memory\n", "\n" + TEXT)]
    expected = []
    for context, continuation in pairs:
        whole = tokenizer((context + continuation).removeprefix("<s>")).input_ids
        before = tokenizer(context.rstrip().removeprefix("<s>")).input_ids
        assert whole[: len(before)] == before
        expected.append(alone(model, whole, len(whole) - len(before)))
    assert_same(lm.loglikelihood(ask("loglikelihood", pairs), disable_tqdm=True), expected, 1e-9)
    ids = tokenizer(TEXT * 3, add_special_tokens=False).input_ids
    found = lm.loglikelihood_rolling(ask("loglikelihood_rolling", [(TEXT * 3,)]))
    assert found == [pytest.approx(alone(model, [start, *ids], len(ids))[0], rel=1e-9)]


def test_lm_evals_own_class_for_transformers_says_the_same():
    """In the form of transformers, padded and masked as that class does it."""
    tokenizer = wrapped("llama3")
    lm = CoMeTLM(small(), batch_size=3, words=TokenText(tokenizer))
    other = get_model("hf")(
        pretrained=CoMeTForCausalLM.from_model(small()), tokenizer=tokenizer, batch_size=3
    )
    pairs = [(TEXT * 5, " The sky"), ("", TEXT), ("The pass key", " is 4711"), (TEXT, "x")]
    asked = ask("loglikelihood", [*pairs, (TEXT * 5, " The grass is green")])
    found = lm.loglikelihood(asked, disable_tqdm=True)
    assert_same(found, other.loglikelihood(asked, disable_tqdm=True), 1e-9)
    given = {"until": ["e"], "max_gen_toks": 20}
    asked = ask("generate_until", [(TEXT * 4, given), ("The sky", given), ("A", given)])
    assert lm.generate_until(asked) == other.generate_until(asked, disable_tqdm=True)


def test_a_text_without_a_start_of_its_own_begins_after_the_token_for_it():
    tokenizer = wrapped("gpt2")
    assert CoMeTLM(small(), words=TokenText(tokenizer)).prefix_token_id == tokenizer.bos_token_id
    tokenizer.bos_token = None
    assert CoMeTLM(small(), words=TokenText(tokenizer)).prefix_token_id == tokenizer.eos_token_id
    tokenizer.eos_token = None
    lm = CoMeTLM(small(), words=TokenText(tokenizer))
    assert lm.loglikelihood(ask("loglikelihood", [("The", " sky")]))[0][0] < 0
    with pytest.raises(ValueError, match="no context, and the tokenizer has neither bos_token nor"):
        lm.loglikelihood(ask("loglikelihood", [("", "The sky")]))


def test_an_answer_ends_with_a_token_that_ends_texts():
    model, words = small(), TokenText(wrapped("llama3"))
    asked = ask("generate_until", [("The sky", {"max_gen_toks": 9})])
    ids = model.generate(torch.tensor([CoMeTLM(model, words=words).tok_encode("The sky")])).ids[0]
    stop = next(token for token in ids if token != ids[0])
    words.stop_ids = (stop,)
    said = CoMeTLM(model, words=words).generate_until(asked)
    assert said == ["".join(map(words.decoder(), ids[: ids.index(stop)]))]


def test_a_chat_is_what_the_template_makes_of_it():
    tokenizer = wrapped("llama3")
    lm = CoMeTLM(small(), words=TokenText(tokenizer))
    chat = [{"role": "user", "content": "Why?"}]
    text = lm.apply_chat_template(chat)
    assert text == "<s><|user|>Why?<|end|><|assistant|>"
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True).input_ids
    assert lm.tok_encode(text) == ids
    assert lm.chat_template(True) == tokenizer.chat_template
    begun = lm.apply_chat_template([*chat, {"role": "assistant", "content": "As"}], False)
    assert begun == "<s><|user|>Why?<|end|><|assistant|>As"
    assert lm.eot_token_id == trained("llama3").token_to_id("<|end|>")
    assert lm.tokenizer_name == tokenizer.name_or_path


@pytest.mark.parametrize("words", [ByteText(), TokenText(wrapped("llama3", None))])
def test_without_a_template_there_is_no_chat(words):
    with pytest.raises(ValueError, match="no chat template; leave --apply_chat_template out"):
        CoMeTLM(small(), words=words).apply_chat_template([{"role": "user", "content": "Why?"}])


def test_models_are_named_as_the_command_names_them(tmp_path):
    """A checkpoint, a backbone with memories fresh or trained, and the form of transformers."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=450,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
    )
    backbone, ours, theirs = (tmp_path / name for name in ("backbone", "ours", "theirs"))
    transformers.LlamaForCausalLM(config).save_pretrained(backbone)
    sizes = "chunk_size=8,global_memory_size=2,temporary_memory_size=4,compression_stride=4,seed=3"
    wrapped("llama3").save_pretrained(backbone)
    fresh = CoMeTLM.create_from_arg_string(f"backbone={backbone},{sizes},dtype=float32")
    assert dataclasses.asdict(fresh.model.config.memory) == dataclasses.asdict(
        MemoryConfig(8, 2, 4, 4)
    )
    fresh.model.save_memories(tmp_path / "memories")
    fresh.model.save_pretrained(ours)
    CoMeTForCausalLM.from_model(fresh.model).save_pretrained(theirs)
    for folder in (ours, theirs):
        fresh.tokenizer.save_pretrained(folder)
    asked = ask("loglikelihood", [(TEXT, " The sky"), ("", TEXT)])
    expected = fresh.loglikelihood(asked, disable_tqdm=True)
    named = [
        f"model={ours}",
        f"model={theirs}",
        f"backbone={backbone},memories={tmp_path}/memories",
    ]
    for arguments in named:
        lm = CoMeTLM.create_from_arg_string(arguments, {"batch_size": 1, "device": None})
        assert lm.loglikelihood(asked, disable_tqdm=True) == expected
    half = get_model("comet").create_from_arg_obj(
        {"model": str(theirs), "dtype": "bfloat16", "batch_size": 4},
        {"batch_size": "1", "device": "cpu"},
    )
    assert (half.model.dtype, half.batch_size, half.device.type) == (torch.bfloat16, 4, "cpu")


def test_the_device_that_lm_eval_gives_unasked_may_not_be_there():
    with patch.object(torch.cuda, "is_available", return_value=False):
        lm = CoMeTLM.create_from_arg_string(
            f"model={passkey.SHIPPED}", {"device": "cuda:0", "batch_size": "2"}
        )
    assert (lm.device.type, lm.batch_size) == ("cpu", 2)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ("", "model is None, backbone None; give one of them in --model_args"),
        ("model=a,backbone=b", "model is 'a', backbone 'b'; give one of them"),
        ("model=a,memories=b", "memories with model, which has memories of its own"),
        ("model=a,chunk_size=8,seed=1", "chunk_size, seed with model, which has memories of its"),
        ("backbone=a,memories=b,seed=1", "seed with memories, which has memories of its own"),
        ("model=a,dtype=auto", "dtype is 'auto'; expected 'float32', 'bfloat16' or 'float16'"),
        ("model=a,batch_size=auto", "batch_size is 'auto'; expected an integer of at least 1"),
        ("model=a,batch_size=0", "batch_size is 0; expected an integer of at least 1"),
        ("backbone=.,chunk_size=0", "chunk_size is 0"),
    ],
)
def test_arguments_that_do_not_fit_are_told(arguments, told):
    with pytest.raises(ValueError, match=told):
        CoMeTLM.create_from_arg_string(arguments)


def test_a_model_that_is_not_there_is_told():
    with pytest.raises(FileNotFoundError, match="nowhere is not there; give the model"):
        CoMeTLM.create_from_arg_string("model=nowhere")


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"num_beams": 4}, "generation_kwargs has num_beams=4; expected until, max_gen_toks"),
        ({"stop": ["a"], "min_p": 0.1}, r"generation_kwargs has stop=\['a'\], min_p=0.1; expected"),
        ({"max_gen_toks": "many"}, "max_gen_toks is 'many'; expected an integer"),
        ({"temperature": -1.0}, "temperature is -1.0; expected a finite number"),
        ({"do_sample": True, "top_p": 2.0}, "top_p is 2.0; expected a number in"),
    ],
)
def test_what_generate_does_not_do_is_told_before_anything_is_read(given, told):
    lm = CoMeTLM(passkey.load_model())
    asked = ask("generate_until", [("The sky", {"until": []}), ("The grass", given)])
    with (
        patch.object(CoMeTLM, "_read", side_effect=AssertionError),
        pytest.raises(ValueError, match=told),
    ):
        lm.generate_until(asked)


def test_a_continuation_without_tokens_is_told():
    with pytest.raises(
        ValueError, match="the continuation '' of 'The sky' has no tokens of its own"
    ):
        CoMeTLM(passkey.load_model()).loglikelihood(
            ask("loglikelihood", [("The sky", " is"), ("The sky", "")])
        )


def test_numbers_beyond_a_dtype_are_told():
    weights = even_weights(SMALL, 0)
    model = CoMeTModel(
        SMALL, tensors(weights | {"lm_head": 6e4 * weights["lm_head"]}, torch.float16)
    )
    lm = CoMeTLM(model, words=TokenText(wrapped("llama3")))
    with pytest.raises(FloatingPointError, match="left the range of float16"):
        lm.loglikelihood(ask("loglikelihood", [("The sky", " is blue")]))


def test_without_lm_eval_it_says_what_to_install():
    script = 'import sys\nsys.modules["lm_eval"] = None\nimport fast.tasks.lm_harness'
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    told = run.stderr.splitlines()[-1]
    assert told.startswith("ImportError: lm-evaluation-harness is not installed (lm_eval")
    assert told.endswith('run pip install "comet-memory[evaluation]".')


def local_tasks(folder):
    """Two tasks of lm_eval's whose data are lines of JSON in a folder: choose a pass key, say it."""
    examples = [passkey.Example(700 + 90 * i, 0.2 * i, i) for i in range(6)]
    lines = [
        {
            "text": one.text().decode(),
            "choices": [str(one.key), str(one.key + 1), str(one.key)[:-1] + "x"],
            "key": f" {one.key}.",
        }
        for one in examples
    ]
    (folder / "keys.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    common = {
        "dataset_path": "json",
        "test_split": "test",
        "doc_to_text": "{{text}}",
    }
    choose = {
        "task": "choose_key",
        "output_type": "multiple_choice",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": 0,
        "target_delimiter": " ",
        "metric_list": [{"metric": "acc"}],
    }
    say = {
        "task": "say_key",
        "output_type": "generate_until",
        "doc_to_target": "{{key}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 12},
        "metric_list": [{"metric": "exact_match"}],
    }
    files = {"data_files": {"test": str(folder / "keys.jsonl")}, "cache_dir": str(folder / "cache")}
    return [common | task | {"dataset_kwargs": dict(files)} for task in (choose, say)]


def test_tasks_of_ones_own_are_measured_and_answers_kept(tmp_path):
    """And asked again, nothing is read."""
    options = {
        "bootstrap_iters": 0,
        "use_cache": str(tmp_path / "answers"),
        "task_manager": TaskManager(include_defaults=False),
    }
    arguments = f"model={passkey.SHIPPED},batch_size=4"
    found = simple_evaluate("comet", arguments, local_tasks(tmp_path), **options)
    assert found["results"]["choose_key"]["acc,none"] == 1.0
    assert found["results"]["say_key"]["exact_match,none"] == 1.0
    model = passkey.load_model()
    for sample in found["samples"]["choose_key"]:
        expected = [bytes_alone(model, *pair) for pair in sample["arguments"]]
        assert_same([one[0] for one in sample["resps"]], expected, 1e-5)
    with patch.object(CoMeTLM, "_read", side_effect=AssertionError):
        again = simple_evaluate("comet", arguments, local_tasks(tmp_path), **options)
    assert again["results"] == found["results"]


COMMAND = """
import json, socket, sys
def refuse(self, address):
    raise OSError("there is no network")
socket.socket.connect = refuse
from fast.tasks.lm_harness import main
for words in json.loads(sys.argv[1]):
    sys.argv[1:] = words
    main()
"""

RULER = (
    "niah_single_1", "niah_multikey_2", "niah_multikey_3", "ruler_vt", "ruler_cwe", "ruler_fwe"
)  # fmt: skip
"""The tasks of lm_eval's RULER that draw their texts without a download."""

IN_BYTES = ("niah_single_1", "ruler_fwe")
"""Those of them that can be drawn in a thousand bytes."""


def test_the_command_measures_ruler_without_a_network(tmp_path):
    """Texts of 1,024 tokens: of the model's own tokenizer, or bytes, by that of transformers."""
    words = dict.fromkeys(["<unk>", *TEXT.split()])
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>"
    ).save_pretrained(tmp_path / "model")
    small(torch.float32).save_pretrained(tmp_path / "model")
    transformers.ByT5Tokenizer().save_pretrained(tmp_path / "bytes")
    runs = {
        "words": (RULER, tmp_path / "model", {}),
        "shipped": (IN_BYTES, passkey.SHIPPED, {"tokenizer": str(tmp_path / "bytes")}),
    }
    commands = [
        ["--model", "comet", "--model_args", f"model={model}", "--batch_size", "2", "--limit", "2",
         "--metadata", json.dumps({"max_seq_lengths": [1024], **metadata}), "--tasks", *tasks,
         "--output_path", str(tmp_path / name)]
        for name, (tasks, model, metadata) in runs.items()
    ]  # fmt: skip
    run = subprocess.run(
        [sys.executable, "-c", COMMAND, json.dumps(commands)],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    for name, (tasks, _, _) in runs.items():
        (path,) = (tmp_path / name).rglob("results_*.json")
        results = json.loads(path.read_text())
        assert set(results["results"]) == set(tasks)
        for task in tasks:
            assert results["n-samples"][task]["effective"] == 2
            assert 0 <= results["results"][task]["1024,none"] <= 1
