"""The constants of the cost model are data."""

import pytest

from attncc.errors import AttnccError
from attncc.resources import path
from attncc.schedule import cost, decode_cost, hopper, hopper_backward
from attncc.schedule.model import model, parse_model

TEXT = (path("schedules") / "model.toml").read_text()


def test_the_shipped_file_is_what_the_model_uses():
    shipped = parse_model(path("schedules") / "model.toml")
    assert shipped == model()
    assert (shipped.triton, shipped.decode) == (cost.FIT, decode_cost.FIT)
    assert (shipped.gluon_forward, shipped.gluon_backward) == (hopper.FIT, hopper_backward.FIT)


def test_a_longer_pipeline_hides_more():
    left = [model().triton.waiting(stages) for stages in range(1, 7)]
    assert left == sorted(left, reverse=True)
    assert left[-1] == 0.0


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("matmul_gap = 10 ", "gap = 10 ", r"\[triton\] has exactly the fields of TritonFit: see gap, matmul_gap"),
        ("[gluon_backward]", "[gluon_sideward]", r"\[gluon_backward\] has exactly"),
        ("[triton]", "[triton", "not a TOML file"),
    ],
)
def test_a_malformed_file_is_named(tmp_path, old, new, said):
    file = tmp_path / "model.toml"
    file.write_text(TEXT.replace(old, new))
    with pytest.raises(AttnccError, match=said):
        parse_model(file)
