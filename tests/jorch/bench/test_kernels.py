"""The report of `jorch bench kernels`: the table shows the numbers that were measured, the plot is an image."""

from jorch.bench import kernels as kernel_bench
from kernels.bench import Line, Timing


def timings():
    return [
        Timing(Line("attention", "packed", path, 512, direction, 1e-6), s, 0.9 * s, 1.1 * s, 2e9, 8e9, 3_000_000)
        for path, s in (("ours", 0.01), ("theirs", 0.05))
        for direction in ("forward", "backward", "both")
    ]


def test_the_table_has_a_row_for_each_path(capsys):
    kernel_bench.print_table(timings(), "this machine")
    rows = [
        [cell.strip() for cell in line.split("│")[1:-1]] for line in capsys.readouterr().out.splitlines() if "│" in line
    ]
    assert rows == [
        ["attention, packed", "512", path, *[f"{ms} ±{half}"] * 3, "2", "8", "3", "1e-06"]
        for path, ms, half in (("ours", 10, 1), ("theirs", 50, 5))
    ]


def test_the_plot_is_an_image(tmp_path):
    kernel_bench.plot(timings(), "this machine", tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
