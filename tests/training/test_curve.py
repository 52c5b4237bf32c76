import json

from gpt.training.curve import draw_curve


def drawn(tmp_path, records, **size):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return draw_curve(path, **size)


def test_a_falling_loss_is_drawn_from_the_upper_left_to_the_lower_right(tmp_path):
    records = [{"step": s, "loss": 4 - s / 50} for s in range(0, 101, 10)]
    records.append({"step": 50, "validation_loss": 4.0})
    picture = drawn(tmp_path, records, width=20, height=5)
    assert picture.splitlines() == [
        "  4.00 ┤⠙⠲⢤⣀      o",
        "       ┤   ⠈⠙⠲⢤⣀",
        "       ┤       ⠈⠉⠒⠤⣀⡀",
        "       ┤            ⠉⠓⠦⣄⡀",
        "  2.00 ┤                ⠉⠓⠦⣄",
        "       └────────────────────",
        "       0            step 100",
    ]


def test_a_run_with_nothing_to_draw_draws_nothing(tmp_path):
    assert drawn(tmp_path, [{"step": 0, "validation_loss": 4.0}, {"step": 1, "loss": 3.0}]) == ""


def test_a_constant_loss_is_drawn(tmp_path):
    assert "step 9" in drawn(tmp_path, [{"step": s, "loss": 2.0} for s in range(10)])


def test_a_terminal_without_unicode_gets_an_ascii_curve(tmp_path):
    records = [{"step": s, "loss": 4 - s / 50} for s in range(0, 101, 10)]
    picture = drawn(tmp_path, records, width=20, height=5, ascii_only=True)
    assert picture.isascii()
    assert picture.splitlines()[0] == "  4.00 |...."
    assert picture.splitlines()[-2] == "       +" + "-" * 20
