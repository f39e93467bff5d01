"""The report of `jorch bench kernels`: the table shows the numbers that were measured, the plot is an image."""

from jorch import arguments
from jorch.bench import kernels as kernel_bench
from kernels.bench import CASES, LeftOut, Line, Timing
from kernels.rivals import DIRECTIONS


def timings():
    return [
        Timing(
            Line("attention", "packed", path, 512, direction, 1e-6), s, 0.9 * s, 1.1 * s, 2e9, 8e9, 3_000_000, 4_000_000
        )
        for path, s, directions in (
            ("ours", 0.01, DIRECTIONS),
            ("theirs", 0.05, DIRECTIONS),
            ("half", 0.05, ("forward",)),
        )
        for direction in directions
    ]


def test_the_table_has_a_row_for_each_path(capsys):
    kernel_bench.print_table(timings(), "this machine")
    rows = [
        [cell.strip() for cell in line.split("│")[1:-1]] for line in capsys.readouterr().out.splitlines() if "│" in line
    ]
    assert rows == [
        ["attention, packed", "512", path, *times, "2", "8", "3", "4", "1e-06"]
        for path, times in (("ours", ["10 ±1"] * 3), ("theirs", ["50 ±5"] * 3), ("half", ["50 ±5", "–", "–"]))
    ]


def test_the_command_knows_the_parts_by_name():
    assert arguments._PARTS["kernels"] == CASES


def test_what_is_left_out_is_said_once():
    left_out = [
        LeftOut("attention", case, path, n, reason)
        for n, case, path, reason in (
            (512, "packed", "jax's splash", "no TPU"),
            (512, "packed", "tokamax", "not installed"),
            (1024, "causal", "jax's splash", "no TPU"),
        )
    ]
    assert kernel_bench.reasons(left_out) == [
        "left out: jax's splash: no TPU (packed 512, causal 1,024)",
        "left out: tokamax: not installed (packed 512)",
    ]


def test_the_plot_is_an_image(tmp_path):
    kernel_bench.plot(timings(), "this machine", tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
