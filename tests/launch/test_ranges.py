"""mode=sample and mode=export refuse what cannot work before anything heavy is imported."""

import subprocess
import sys
from pathlib import Path

import pytest

from trainkit.launch.explain import UserError
from trainkit.launch.preflight import check

ROOT = Path(__file__).parents[2]
MISTAKES = {
    "sample.temperature=-1": "it must be a number of at least 0",
    "sample.temperature=inf": "it must be a number of at least 0",
    "sample.temperature=nan": "it must be a number of at least 0",
    "sample.top_p=0": "it must be a number above 0 and at most 1",
    "sample.top_p=1.01": "it must be a number above 0 and at most 1",
    "sample.top_p=nan": "it must be a number above 0 and at most 1",
    "sample.tokens=0": "it must be a whole number of at least 1",
    "sample.tokens=1.5": "sample.tokens wants a whole number",
    "sample.top_k=0": "it must be a whole number of at least 1, or null",
    "sample.top_k=few": "it must be a whole number of at least 1, or null",
    "sample.count=0": "it must be a whole number of at least 1",
    "sample.seed=-1": "it must be a whole number from 0",
    "sample.prompt=null": "it must be a text",
    "sample.prompt='\udcff'": "it must be a text in UTF-8",
    "sample.lenght=3": "there is no key 'sample.lenght'\nkeys of sample: count, prompt",
    "sample=null": "sample is a node with keys of its own",
    "export.format=onnx": "no such format",
    "export.format=trainkti": "did you mean 'trainkit'",
    "export.dir=3": "it must name a folder",
}


@pytest.mark.parametrize("word", MISTAKES)
@pytest.mark.parametrize("mode", ["sample", "train"])
def test_values_that_cannot_work_are_one_sentence(word, mode):
    with pytest.raises(UserError, match=MISTAKES[word]):
        check([f"mode={mode}", "resume=last", word] if mode != "train" else [word])


@pytest.mark.parametrize("mode", ["sample", "export"])
def test_they_work_on_a_run(mode):
    with pytest.raises(UserError, match=f"mode={mode} works on an earlier run: add resume=DIR"):
        check([f"mode={mode}"])


def test_an_export_overwrites_nothing(tmp_path):
    words = ["mode=export", "resume=last", f"export.dir={tmp_path}"]
    check(words)  # it is empty
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="is not empty, and an export overwrites nothing; name another folder"):
        check(words)
    with pytest.raises(UserError, match="is a file; name a new folder"):
        check([*words[:2], f"export.dir={tmp_path}/file"])
    check([f"export.dir={tmp_path}"])  # nothing is exported


def test_the_values_are_read_without_torch():
    code = (
        "import sys\nfrom trainkit.launch.preflight import check\n"
        "plan = check(['mode=sample', 'resume=last', 'sample.top_p=0.9', 'sample.temperature=0', 'sample.top_k=5'])\n"
        "assert plan.configs[0].sample.top_p == 0.9 and plan.configs[0].sample.prompt == ''\n"
        "assert 'torch' not in sys.modules and 'lightning' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
