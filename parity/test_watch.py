"""The page that shows a model reading: what it tells is what the recorder saw, whoever wrote the
text; and it opens and steps in a real browser.
"""

import http.client
import json
import os
import shutil
import socket
import threading
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from fast import CoMeTModel, Recorder, watch
from fast.__main__ import main
from fast.rows import KINDS
from fast.tasks import passkey

from .assertions import assert_near
from .strategies import cases, random_model

pytestmark = pytest.mark.host

HOSTILE = b"</script><img src=x onerror=\"document.title='owned'\"><!--\xff\x00\xe2\x80\xae" * 3

NONE = "\N{EN DASH}"
"""Where a chunk is still open."""

SHOWN = 0.0006
"""Three decimals are shown, of the four digits that the page is given."""


@pytest.fixture(scope="module")
def model():
    return CoMeTModel.from_pretrained(passkey.SHIPPED)


@pytest.fixture(scope="module")
def example():
    """Eight chunks, the key in the fourth, the question in the last."""
    return passkey.Example(1000, 0.4, 3, passkey.read_haystack())


@pytest.fixture(scope="module")
def file(example, tmp_path_factory):
    path = tmp_path_factory.mktemp("watched") / "passkey.txt"
    path.write_bytes(example.text())
    return path


@pytest.fixture(scope="module")
def recorded(model, example):
    """Of one call over the whole text: the rounds of each chunk."""
    recorder, ids = Recorder(), torch.from_numpy(passkey.encode(example.text()))
    model.generate(ids, max_new_tokens=8, stop_ids=(10,), recorder=recorder)
    return by_chunk(recorder)


def by_chunk(recorder):
    found = {}
    for r in recorder.rounds:
        found.setdefault(int(r.chunk[0]), []).append(r)
    return list(found.values())


def heads_mean(rounds, layer):
    """[w, 4] of a chunk's text tokens."""
    return np.concatenate([r.attention[layer][0].mean(axis=0) for r in rounds])


def content(document):
    """What the page was given."""
    text = document.partition('<script type="application/json" id="content">')[2]
    return json.loads(text.partition("</script>")[0])


@given(case=cases(), answer=st.integers(0, 9))
def test_the_rounds_of_a_chunk_are_joined(case, answer):
    """Read chunk by chunk, it is what one recorder sees of one call."""
    config, seed, ids = case
    model, recorder = random_model(config, seed), Recorder()
    said = model.generate(
        torch.tensor([ids]), max_new_tokens=answer, stop_ids=(10,), recorder=recorder
    )
    chunks, found = watch.read(model, bytes(ids), answer)
    assert list(found) == said.ids[0]
    assert len(chunks) == len(by_chunk(recorder))
    for chunk, rounds in zip(chunks, by_chunk(recorder), strict=True):
        kinds = rounds[-1].kinds[0]
        assert chunk.kinds.tolist() == kinds[kinds >= 0].tolist()
        assert chunk.ages.tolist() == rounds[-1].ages[0].tolist()
        for layer, attention in enumerate(chunk.attention):
            assert_near(attention, heads_mean(rounds, layer), "attention")
        last = rounds[-1]
        is_told = bool(last.gate) and bool(last.closes[0])
        assert len(chunk.gate) == len(chunk.moved) == is_told * config.backbone.num_hidden_layers
        for gate, moved, g, m in zip(chunk.gate, chunk.moved, last.gate, last.moved, strict=False):
            assert_near(gate, g[0].mean(axis=-1), "gate")
            assert_near(moved, m[0], "moved")


def test_the_page_is_given_what_was_recorded(model, file, example, recorded):
    """To four digits; and the text, the answer, and where the key is."""
    told = content(watch.watch(model, file))
    assert (told["name"], told["bytes"], told["isCut"]) == ("passkey.txt", 1000, False)
    text = "".join("".join(chunk["text"]) for chunk in told["chunks"])
    assert text == example.text().decode() + f" {example.key}.\n"
    assert [[text[a:b] for a, b in told["spans"]]] == [[f"The pass key is {example.key}"]]
    assert told["kinds"] == list(KINDS)
    for chunk, rounds in zip(told["chunks"], recorded, strict=True):
        last = rounds[-1]
        assert chunk["kinds"] == last.kinds[0].tolist()
        assert chunk["ages"] == last.ages[0].tolist()
        attention = [heads_mean(rounds, layer) for layer in range(3)]
        assert np.allclose(chunk["attention"], [x.mean(axis=0) for x in attention], rtol=1e-3)
        assert np.allclose(chunk["looks"], np.mean(attention, axis=0)[:, 0], rtol=1e-3)
        gate = [g[0, :, 0] for g in last.gate]
        assert np.allclose(chunk["gate"], gate, rtol=1e-3)
        assert np.array_equal(np.array(chunk["gate"]) == 1, np.array(gate) == 1)
        assert np.allclose(chunk["moved"], [m[0] for m in last.moved], rtol=1e-3)


def test_a_long_file_is_cut_and_the_page_says_so(model, file):
    """What is behind the cut is neither read nor answered."""
    told = content(watch.watch(model, file, chunks=2))
    assert (told["bytes"], told["isCut"], len(told["chunks"])) == (256, True, 2)
    assert sum(len(chunk["text"]) for chunk in told["chunks"]) == 256
    whole = content(watch.watch(model, file, chunks=8, answer=0))
    assert (whole["bytes"], whole["isCut"]) == (1000, False)
    assert len(whole["chunks"][-1]["text"]) == 1000 - 7 * 128


@given(st.binary() | st.text().map(str.encode))
def test_any_bytes_can_be_shown(data):
    """One string a byte, and nothing in them that would not show, or would turn the text around."""
    shown = watch.characters(data)
    assert len(shown) == len(data)
    assert all(c.isprintable() or c in "\n\t" for c in "".join(shown))
    printable = data.decode("utf-8", "replace")
    if printable.encode() == data and printable.isprintable():
        assert "".join(shown) == printable


def test_what_cannot_be_shown_is_written_out():
    told = [("é\n\t", ["é", "", "\n", "\t"]), ("\u202e", ["\\u202e", "", ""]), ("\x1b", ["\\x1b"])]
    for text, shown in told:
        assert watch.characters(text.encode()) == shown
    assert watch.characters(b"\xffa\xe2\x82") == ["\\xff", "a", "\\xe2", "\\x82"]


def test_no_text_ends_the_data(model, tmp_path):
    """Nor does a file's name."""
    file = tmp_path / "<!--<script>&.txt"
    file.write_bytes(HOSTILE)
    document = watch.watch(model, file)
    data = document.partition('id="content">')[2].partition("</script>")[0]
    assert "<" not in data
    told = content(document)
    assert told["name"] == file.name
    assert "".join(told["chunks"][0]["text"]).startswith("</script><img src=x onerror=")


@contextmanager
def serving(document):
    with watch.PageServer(0) as server:
        server.document = document.encode()
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def get(port, path="/", host=None):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    connection.request("GET", path, headers={"Host": host} if host else {})
    answer = connection.getresponse()
    return answer.status, answer.read().decode()


def test_the_page_is_served_to_this_machine_alone():
    """One address, one document, and no name that a stranger could point here."""
    with serving("the page") as server:
        port = server.server_port
        assert get(port) == get(port, host=f"localhost:{port}") == (200, "the page")
        assert get(port, "/../etc/passwd")[0] == 404
        assert get(port, host="stranger.example")[0] == 403
        assert server.socket.getsockname()[0] == "127.0.0.1"
        with pytest.raises(ConnectionRefusedError):  # all addresses would include this one
            socket.create_connection(("127.0.0.2", port), timeout=2)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["FOLDER/none"], "No such file or directory: 'FOLDER/none'"),
        (["FOLDER/empty"], "FOLDER/empty is empty; give a text."),
        (["FILE", "--model", "FOLDER"], "No such file or directory: 'FOLDER/config.json'"),
        (["FILE", "--chunks", "0"], "chunks is 0; expected an integer of at least 1."),
        (["FILE", "--answer", "-1"], "answer is -1; expected an integer of at least 0."),
        (["FILE", "--highlight", "("], "'(' is no regular expression: missing )"),
        (["FILE", "--port", "70000"], "port 70000 of 127.0.0.1 cannot be had (no such port)"),
        (["FILE", "--port", "TAKEN"], "Address already in use); choose another with --port."),
    ],
)
def test_a_mistake_is_told_in_one_sentence(words, said, file, tmp_path, capsys):
    (tmp_path / "empty").touch()
    with watch.PageServer(0) as server:
        names = {"FOLDER": tmp_path, "FILE": file, "TAKEN": server.server_port}
        for name, value in names.items():
            words = [word.replace(name, str(value)) for word in words]
            said = said.replace(name, str(value))
        with pytest.raises(SystemExit) as ended:
            main(["watch", "--port", "0", *words])  # any that is free, unless words say another
    found = capsys.readouterr().err
    assert ended.value.code == 2
    assert said in found
    assert found.count("\n") == 1


def test_a_model_of_other_tokens_is_refused(file, make_config):
    model = random_model(make_config(), 0)
    with pytest.raises(ValueError, match="the model has a vocabulary of 11; a byte-level one has"):
        watch.watch(model, file)


@pytest.fixture(scope="module")
def browser():
    """Headless Chromium, or Chrome, and its driver."""
    program = shutil.which("google-chrome") or shutil.which("chromium")
    driver = shutil.which("chromedriver")
    how = "the page is tested in a browser: run apt-get install chromium chromium-driver"
    assert program, f"Chromium is missing; {how}"
    assert driver, f"Chromium's driver is missing; {how}"
    options = webdriver.ChromeOptions()
    options.binary_location = program
    for word in ("headless=new", "disable-gpu", "disable-dev-shm-usage"):
        options.add_argument(f"--{word}")
    if os.geteuid() == 0:
        options.add_argument("--no-sandbox")
    browser = webdriver.Chrome(options=options, service=Service(driver))
    yield browser
    browser.quit()


def open_page(browser, url, width=1100):
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.get("about:blank")
    browser.get(url)


def press(browser, *keys):
    ActionChains(browser).send_keys(*keys).perform()


def shown(browser):
    """What the page says of the chunk it stands at."""
    script = """
      const texts = (query) => [...document.querySelectorAll(query)].map((e) => e.textContent);
      return {
        where: texts("#where")[0], text: texts("#text .now")[0], keys: texts("#text .now mark"),
        said: texts("#text .now ins").join(""), row: texts("#row")[0],
        queue: texts("#queue span").map(Number),
        gate: texts("#gate table:first-of-type td").map(Number),
        moved: texts("#gate table:last-of-type td").map(Number),
        attention: texts("#attention tbody td:not([aria-hidden])").map(Number),
        charts: texts("#charts .line > :last-child").slice(1),
      };
    """
    return browser.execute_script(script)


def assert_shows(found, chunk, rounds, example):
    """A chunk of the page, and the rounds of the recorder."""
    text, last = watch.characters(example.text() + f" {example.key}.\n".encode()), rounds[-1]
    start, end = 128 * chunk, 128 * chunk + sum(int(r.take[0]) for r in rounds)
    assert found["where"].startswith(f"chunk {chunk + 1} of 8: bytes {start} to {end - 1}")
    assert found["text"] == "".join(text[start:end])
    assert found["row"] == "".join("GTxCR"[kind] for kind in last.kinds[0])
    assert found["queue"] == last.ages[0].tolist()
    gate = np.array([g[0, :, 0] for g in last.gate])
    attention = np.array([heads_mean(rounds, layer).mean(axis=0) for layer in range(3)])
    assert np.abs(np.array(found["gate"]) - gate.ravel()).max(initial=0) < SHOWN
    assert (
        np.abs(np.array(found["moved"]) - np.ravel([m[0] for m in last.moved])).max(initial=0)
        < SHOWN
    )
    assert np.abs(np.array(found["attention"]) - attention.ravel()).max() < SHOWN
    charts = [*(1 - gate.mean(axis=1) if len(gate) else [NONE] * 3), *attention[:, 0]]
    for word, value in zip(found["charts"], charts, strict=True):
        assert word == value if value == NONE else abs(float(word) - value) < SHOWN


def test_the_page_steps_by_keyboard_and_slider(browser, model, file, example, recorded):
    """Everything that it shows of each chunk is the recorder's; the key is marked, the answer too;
    and nothing goes over the edge of a narrow window."""
    with serving(watch.watch(model, file)) as server:
        open_page(browser, f"http://127.0.0.1:{server.server_port}/")
        assert "passkey.txt" in browser.title
        for chunk, rounds in enumerate(recorded):
            found = shown(browser)
            assert_shows(found, chunk, rounds, example)
            here = found["where"].endswith(", highlighted")
            assert here == (chunk == example.key_start // 128)
            assert "".join(found["keys"]) == here * f"The pass key is {example.key}"
            assert found["said"] == (chunk == 7) * f" {example.key}.\n"
            press(browser, Keys.ARROW_RIGHT)
        for key, chunk in ((Keys.HOME, 0), (Keys.END, 7), (Keys.ARROW_LEFT, 6)):
            press(browser, key)
            assert_shows(shown(browser), chunk, recorded[chunk], example)

        slider = browser.find_element(By.ID, "slider")
        for keys, chunk in (
            ((Keys.HOME,), 0),
            ((Keys.ARROW_LEFT,), 0),
            ((Keys.ARROW_RIGHT,) * 3, 3),
            ((Keys.END,), 7),
            ((Keys.ARROW_RIGHT,), 7),
        ):
            slider.send_keys(*keys)
            assert_shows(shown(browser), chunk, recorded[chunk], example)
        left = -slider.size["width"] // 2 + 8  # its middle is where the mouse goes first
        ActionChains(browser).move_to_element_with_offset(slider, left, 0).click().perform()
        assert_shows(shown(browser), 0, recorded[0], example)
        browser.find_element(By.ID, "on").click()
        assert_shows(shown(browser), 1, recorded[1], example)

        for chunk in range(8):
            open_page(browser, f"http://127.0.0.1:{server.server_port}/#{chunk + 1}", 400)
            assert_shows(shown(browser), chunk, recorded[chunk], example)
            wide = "return document.documentElement.scrollWidth > innerWidth"
            assert not browser.execute_script(wide)
        assert browser.get_log("browser") == []


def test_a_written_page_is_the_one_that_is_served(browser, file, example, recorded, tmp_path):
    """The file opens without a server."""
    page = tmp_path / "page.html"
    main(["watch", str(file), "--html", str(page)])
    assert page.read_text() == watch.watch(CoMeTModel.from_pretrained(passkey.SHIPPED), file)
    open_page(browser, page.as_uri())
    press(browser, Keys.END)
    assert_shows(shown(browser), 7, recorded[7], example)
    assert browser.get_log("browser") == []


def test_a_hostile_text_stays_text(browser, model, tmp_path):
    file = tmp_path / "<img src=x>.txt"
    file.write_bytes(HOSTILE)
    (tmp_path / "page.html").write_text(watch.watch(model, file))
    open_page(browser, (tmp_path / "page.html").as_uri())
    assert browser.find_element(By.ID, "name").text == file.name
    assert browser.find_elements(By.TAG_NAME, "img") == []
    found = shown(browser)["text"]
    assert found.startswith("</script><img src=x onerror=\"document.title='owned'\"><!--\\xff\\x00")
    assert "\\u202e" in found
    assert browser.title != "owned"
    assert browser.get_log("browser") == []
