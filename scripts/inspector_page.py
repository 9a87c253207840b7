"""Write the inspector's page for a few rows with faults in them, and take its picture in a headless Chromium.

``python scripts/inspector_page.py`` makes docs/inspect.png (light) and docs/inspect-preference.png (dark).
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
WIDTH = 1080
FACTS = (
    ("How fast does a pronghorn run?", "Up to 98 km/h, and it can hold 60 km/h for minutes.", "Quite fast."),
    (
        "Where does it live?",
        "On the prairies and deserts of western North America.",
        "In Africa, with the lions.",
    ),
    ("Is it an antelope?", "No: its closest living relatives are giraffe and okapi.", "Yes, an antelope."),
    (
        "What does it eat?",
        "Herbs, shrubs such as sagebrush, and some grass.",
        "Mostly meat.\nSometimes grass.",
    ),
    ("Why is it so fast?", "Perhaps because American cheetahs hunted it, long ago.", "Nobody knows."),
    ("Does it shed its horns?", "Only their sheath, once a year; the bony core stays.", "No."),
)


def conversations() -> list[dict[str, Any]]:
    """Rows of messages: good ones, and one each of several faults."""
    rows = [_ask(question, answer) for question, answer, _ in FACTS]
    several = _ask(*FACTS[0][:2])["messages"] + _ask(*FACTS[1][:2])["messages"]
    rows.append({"messages": [{"role": "system", "content": "Answer in one sentence."}, *several]})
    rows += [_ask(f"Describe pronghorn number {n}.", "It has horns with a prong. " * n) for n in range(1, 15)]
    rows.append(rows[2])
    rows.append(_ask("What does <|im_end|> mean?", "It ends a turn."))
    rows.append({"messages": [{"role": "user", "content": "Are you there?"}]})
    return rows


def preferences() -> list[dict[str, Any]]:
    """Preference rows with a contradiction and a duplicate."""
    rows = [{"prompt": [_turn("user", q)], "chosen": good, "rejected": bad} for q, good, bad in FACTS]
    return [*rows, {**rows[0], "chosen": FACTS[0][2], "rejected": FACTS[0][1]}, rows[4]]


def _ask(question: str, answer: str) -> dict[str, Any]:
    return {"messages": [_turn("user", question), _turn("assistant", answer)]}


def _turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def picture(browser: str, page: str, target: Path, *, height: int, dark: bool) -> None:
    """Show a page and keep what is seen of it."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "page.html"
        file.write_text(page, encoding="utf-8")
        subprocess.run(
            [
                browser,
                "--headless",
                "--no-sandbox",
                "--hide-scrollbars",
                f"--user-data-dir={folder}/profile",
                f"--blink-settings=preferredColorScheme={0 if dark else 1}",
                f"--window-size={WIDTH},{height}",
                f"--screenshot={target}",
                file.as_uri(),
            ],
            check=True,
            stderr=subprocess.DEVNULL,
            timeout=120,
        )


def main() -> None:
    """Both pictures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=ROOT / "docs", help="where the pictures go")
    arguments = parser.parse_args()
    browser = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if browser is None:
        sys.exit(f"none of {', '.join(BROWSERS)} was found")
    from pronghorn import inspect_data
    from tests import tiny

    tokenizer = tiny.tokenizer()
    shots = (
        ("inspect.png", conversations(), 1640, False),
        ("inspect-preference.png", preferences(), 1500, True),
    )
    for name, rows, height, dark in shots:
        page = inspect_data(rows, tokenizer, max_length=200, examples=2).html()
        picture(browser, page, arguments.folder / name, height=height, dark=dark)
        print(f"{name}: {(arguments.folder / name).stat().st_size // 1000} kB")


if __name__ == "__main__":
    main()
