"""What runs leave as JSON."""

import json
import math

from trainkit.launch.rundir import read_json, write_json


def test_what_is_written_is_strict_json_and_reads_back(tmp_path):
    value = {
        "metrics": {"val/loss": math.nan, "best": [math.inf, -math.inf, 1.5]},
        "path": tmp_path,
        "n": 3,
        "no": None,
    }
    write_json(tmp_path / "result.json", value)

    def refuse(token):
        raise AssertionError(f"{token} is no JSON")

    json.loads((tmp_path / "result.json").read_text(), parse_constant=refuse)
    found = read_json(tmp_path / "result.json")
    assert math.isnan(found["metrics"]["val/loss"])
    assert found["metrics"]["best"] == [math.inf, -math.inf, 1.5]
    assert (found["path"], found["n"]) == (str(tmp_path), 3)
