"""What an adapter folder says of its evaluation is checked as what a user types is."""

import json

import pytest

from rolora.errors import BadInput
from rolora.run import adapter_folder


def written(folder, whole):
    (folder / adapter_folder.SIDECAR).write_text(json.dumps(whole))
    return folder


def test_options_and_labels_come_back_and_a_folder_may_say_nothing(tmp_path):
    assert adapter_folder.read(tmp_path) is None
    options = {"max_length": 48, "quantize": "none", "label_column": None}
    folder = written(tmp_path, {"options": options, "labels": ["no", "yes"]})
    assert adapter_folder.read(folder) == adapter_folder.Kept(
        {"max_length": 48, "quantize": "none"}, ["no", "yes"]
    )


def test_an_adapter_decides_nothing_of_the_machine_it_is_evaluated_on(tmp_path):
    options = {"threads": 10**9, "device": "cuda", "model": "/etc", "output_dir": "/", "seed": -1}
    found = adapter_folder.read(written(tmp_path, {"options": options, "labels": None}))
    assert found == adapter_folder.Kept({}, None)


@pytest.mark.parametrize(
    "options, expected",
    [
        ({"max_length": 10**12}, "--max-length 1000000000000: expected at most"),
        ({"max_length": float("nan")}, "--max-length nan: expected a whole number"),
        ({"max_length": -1}, "--max-length -1: expected at least"),
        ({"quantize": 7}, "--quantize 7: expected text"),
        ({"task_type": "poetry"}, "--task-type 'poetry' is not one of"),
    ],
)
def test_values_that_no_option_takes_are_refused_with_the_files_name(options, expected, tmp_path):
    with pytest.raises(BadInput) as caught:
        adapter_folder.read(written(tmp_path, {"options": options, "labels": None}))
    message = str(caught.value)
    assert message.startswith(str(tmp_path / "rolora.json")) and expected in message
    assert "\n" not in message


@pytest.mark.parametrize(
    "whole",
    [
        [1],
        {},
        {"options": [], "labels": None},
        {"options": {}, "labels": 5},
        {"options": {}, "labels": [1]},
    ],
)
def test_a_damaged_file_is_refused_in_one_line(whole, tmp_path):
    with pytest.raises(BadInput, match=r"rolora\.json is damaged: remove it"):
        adapter_folder.read(written(tmp_path, whole))
