"""The pass-key task, its measurement, and the model that comes with it."""

import numpy as np
import pytest

from fast.tasks import passkey
from fast.tasks.passkey_report import lower_bound


@pytest.mark.parametrize("variant", passkey.VARIANTS)
@pytest.mark.parametrize("length", [300, 1024, 5001])
@pytest.mark.parametrize("depth", [0.0, 0.37, 1.0])
def test_a_text_has_its_length_its_five_parts_and_its_key(variant, length, depth):
    haystack = passkey.read_haystack() if variant == "prose" else None
    example = passkey.Example(length, depth, 3, haystack)
    text = example.text()
    information = passkey.INFORMATION.format(key=example.key).encode()
    assert len(text) == length
    assert text == example.text()
    assert text.startswith(passkey.DESCRIPTION.encode())
    assert text.endswith(b"\n" + passkey.QUESTION.encode())
    assert text[example.key_end - len(information) : example.key_end] == information
    assert text.count(b"The pass key is") == 2
    assert b"".join(passkey.blocks(example, 128)) == text


def test_depths_go_from_start_to_end():
    ends = [passkey.Example(4096, d, 0).key_end for d in np.linspace(0, 1, 11)]
    assert ends == sorted(ends)
    assert ends[0] < 300
    assert ends[-1] > 3900


def test_bad_texts_say_what_is_wrong():
    with pytest.raises(ValueError, match=r"depth is 1\.5"):
        passkey.Example(1000, 1.5, 0)
    with pytest.raises(ValueError, match="length is 100 bytes; the task's fixed parts need 2"):
        passkey.Example(100, 0.5, 0)


def test_the_first_number_counts():
    assert passkey.first_number(b" 123.\n") == 123
    assert passkey.first_number(b"is 7, not 8") == 7
    assert passkey.first_number(b"none") is None


def test_the_bound_is_clopper_and_pearson_s():
    assert lower_bound(55, 55) == pytest.approx(0.05 ** (1 / 55), abs=1e-9)
    assert lower_bound(0, 9) == 0.0
    assert lower_bound(9, 10) == pytest.approx(0.6058, abs=1e-4)


def test_the_shipped_model_finds_keys():
    """Far from a measurement: enough to notice that it has stopped working."""
    model = passkey.load_model()
    right = sum(passkey.found(model, [passkey.Example(5000, d / 10, d) for d in range(11)]))
    assert right >= 9
