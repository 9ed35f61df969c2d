"""A sample of the mutated files of `fuzz_gguf.py`."""

import fuzz_gguf
import pytest


@pytest.mark.usefixtures("quick_compilation")
def test_mutated_files_load_or_are_refused_in_one_line(capfd):
    counts = fuzz_gguf.run(300, seed=1, load=0.02)
    assert not counts["FAULT"], capfd.readouterr().out
    assert counts["refused"] > 100 and counts["accepted"] > 20 and counts["loaded"] > 0
