"""The one command for a GPU, on small models, whole."""

from softrepa_tests.comfy.test_benchmarks import command

from benchmarks import gpu


def test_the_table_of_small_models():
    done = command("--small")
    assert done.returncode == 0, done.stderr
    rows = [line for line in done.stdout.splitlines() if line.startswith("| ")]
    assert [row.split(" | ")[0][2:] for row in rows[2:]] == [case.title for case in gpu.SMALL_CASES]
    assert {row.count(" | ") for row in rows} == {len(gpu.COLUMNS)}
    assert " - |" not in done.stdout
