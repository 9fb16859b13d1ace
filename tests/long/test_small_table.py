"""The commands for a GPU, on small models, whole."""

from softrepa_tests.comfy.test_benchmarks import command

from benchmarks import gpu


def test_the_table_of_small_models():
    done = command("--small")
    assert done.returncode == 0, done.stderr
    rows = [line for line in done.stdout.splitlines() if line.startswith("| ")]
    assert [row.split(" | ")[0][2:] for row in rows[2:]] == [case.title for case in gpu.SMALL_CASES]
    assert {row.count(" | ") for row in rows} == {len(gpu.COLUMNS)}
    assert " - |" not in done.stdout


def test_the_variants():
    done = command("--variants", "--small", "--part", "sd15")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    for name in ("plain", "autocast to bfloat16", "ours", "channels last", "flash attention"):
        assert any(f" {name} " in line and "gradient" in line for line in lines), name
    # a kernel that this machine lacks is said, and does not end the rest
    assert any("cudnn attention" in line for line in lines)
