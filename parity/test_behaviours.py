"""The suite is tested: a wrong function in the place of one of `fast/`'s must make its law fail.

By an assertion, as in `test_faults.py`, but in this process: what is wrong is what the function
does, not how its text reads.
"""

from unittest.mock import patch

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import run_state_machine_as_test

from . import test_decoding, test_gradients, test_state
from .behaviours import FAULTS
from .strategies import VOCAB, cases, seeds
from .test_stateful import Changes, Walk

pytestmark = pytest.mark.host

SETTINGS = settings(
    max_examples=400,  # most faults take a few; as many as this only one that goes unnoticed
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.generate],
    report_multiple_bugs=False,
    suppress_health_check=list(HealthCheck),
)

FEW = settings(SETTINGS, max_examples=10)
"""To see that a law holds without a fault: that it does with more, it shows itself."""


def walk(machine, steps):
    """Random walks that are the same in every run."""
    return lambda examples, _: run_state_machine_as_test(
        machine, settings=settings(examples, stateful_step_count=steps)
    )


def hold(test, **strategies):
    """A property, over random cases that are the same in every run."""
    return lambda examples, _: examples(given(**strategies)(test.hypothesis.inner_test))()


LAWS = {
    "walk": walk(Walk, 8),
    "changes": walk(Changes, 16),
    "gradients": hold(
        test_gradients.test_gradients_through_calls, case=test_gradients.streams_of_calls()
    ),
    "chances": hold(
        test_decoding.test_every_sequence_of_a_batch_samples_its_own_chances,
        seed=seeds,
        temperature=st.sampled_from([0.3, 1.0, 3.0]),
        top_k=st.sampled_from([None, 1, 2, 4, VOCAB + 1]),
        top_p=st.sampled_from([None, 0.2, 0.7, 1.0]),
    ),
    "contradictions": hold(
        test_state.test_a_contradiction_in_any_sequence_is_told, case=cases(), data=st.data()
    ),
    "fields": lambda _, make_config: test_state.test_a_state_knows_every_field_of_its_config(
        make_config
    ),
}


@pytest.mark.parametrize("what", list(FAULTS))
def test_a_wrong_behaviour_makes_its_law_fail(what, make_config):
    owner, name, wrong, law = FAULTS[what]
    right = vars(owner)[name]
    bound = getattr(owner, name) if isinstance(right, classmethod) else right
    with (
        patch.object(owner, name, wrong(bound)),
        pytest.raises((AssertionError, pytest.fail.Exception)),
    ):
        LAWS[law](SETTINGS, make_config)


@pytest.mark.parametrize("law", list(LAWS))
def test_the_same_laws_hold_without(law, make_config):
    LAWS[law](FEW, make_config)
