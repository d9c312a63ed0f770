"""Pages in a real browser: drawing, keys, pointers, hostile texts, and no request to the network."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.browser import chromium, opened
from support.fake_cache import write_cache
from support.pages import shown_sequence
from support.tools import run
from tokenizers import Tokenizer, models

from todi_offline.cache.format.rows import TargetRows
from todi_offline.cache.format.sequences import CachedSequence
from todi_offline.pages.blocks import facts, lines, numbers, series, table, texts
from todi_offline.pages.page import Page, Section
from todi_offline.pages.texts import TokenTexts
from todi_offline.pages.tokens import ShownSequence, token_block

pytestmark = pytest.mark.browser

HOSTILE = ["<script>document.title='owned'</script>", "<img src=x onerror=alert(1)>", "\u202eevil", "</script>", "ok"]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as found:
        yield found


@pytest.fixture
def view(tmp_path: Path) -> Path:
    """A page with the tokens of two sequences that a student has read."""
    shown = [shown_sequence(number, with_student=True) for number in (3, 12)]
    block = token_block(shown, TokenTexts(None), temperature=1.0, beta=1.0)
    return write(tmp_path, block)


def write(folder: Path, *blocks: dict) -> Path:
    file = folder / "page.html"
    Page("A page", [Section("A section", "", list(blocks))]).write(file)
    return file


def test_the_page_of_a_cache_draws_charts_tokens_and_a_table_that_sorts(tmp_path: Path, browser: Any) -> None:
    root, file = write_cache(tmp_path / "cache"), tmp_path / "cache.html"
    run("view", root, "--out", file)
    for dark in (False, True):
        for width in (1280, 400):
            with opened(browser, file, width=width, dark=dark) as seen:
                seen.page.wait_for_selector("svg.chart")
                assert seen.page.locator("svg.chart").count() == 6
                assert seen.page.evaluate("document.documentElement.scrollWidth") <= width
    with opened(browser, file) as seen:
        seen.page.get_by_role("button", name="teacher NLL").click()
        cells = seen.page.locator(".scrolling tbody tr td:nth-child(6)").all_inner_texts()
        assert len(cells) == 24
        assert [float(cell) for cell in cells] == sorted(float(cell) for cell in cells)
        assert seen.page.locator("th[aria-sort=ascending]").inner_text().startswith("teacher NLL")
        seen.page.get_by_role("button", name="teacher NLL").click()
        assert seen.page.locator(".scrolling tbody tr td:nth-child(6)").all_inner_texts() == cells[::-1]
        seen.page.locator("svg.chart").first.focus()
        seen.page.keyboard.press("ArrowRight")
        assert seen.page.locator(".readout").first.inner_text().startswith("at 1:")


def test_keys_go_from_token_to_token_and_the_address_says_where(view: Path, browser: Any) -> None:
    with opened(browser, view, "#seq=12&tok=2") as seen:
        assert seen.panel().startswith("Token 2:")
        first = seen.current()
        seen.page.keyboard.press("ArrowRight")
        assert seen.panel().startswith("Token 3:")
        seen.page.keyboard.press("ArrowLeft")
        assert seen.current() == first
        seen.page.keyboard.press("End")
        last = int(seen.page.locator(".panel").get_attribute("data-token"))
        assert seen.page.locator(".tokens > span").count() == last + 1
        seen.wait_for_address(f"seq=12&tok={last}")
        seen.page.keyboard.press("Shift+ArrowRight")
        seen.wait_for_address("seq=3&")
        seen.page.evaluate("location.hash = '#seq=99'")
        seen.page.get_by_text("This page does not show sequence 99.").wait_for()


def test_a_token_is_shown_on_hover_on_focus_and_by_a_tap(view: Path, browser: Any) -> None:
    with opened(browser, view, "#seq=3&tok=1") as seen:
        spans = seen.page.locator(".tokens > span")
        spans.nth(4).hover()
        assert seen.panel().startswith("Token 4:")
        seen.page.locator("#colour").focus()
        seen.page.keyboard.press("Tab")
        assert seen.panel().startswith("Token 1:")
        spans.nth(6).click()
        assert seen.panel().startswith("Token 6:")
        seen.wait_for_address("seq=3&tok=6")


def test_the_panel_labels_its_numbers(view: Path, browser: Any) -> None:
    item = shown_sequence(3, with_student=True)
    token = int(np.flatnonzero(item.sequence.target_mask)[0]) + 1
    block = token_block([item], TokenTexts(None), temperature=1.0, beta=1.0)
    with opened(browser, view, f"#seq=3&tok={token}") as seen:
        rows = [row.split("\t") for row in seen.page.locator(".entries tbody tr").all_inner_texts()]
        assert len(rows) == 8 + 5 + 2
        p, q, part = (float(block[name][0][0]) for name in ("entry_p", "entry_q", "entry_part"))
        numbers = [float(cell.strip().rstrip("%")) for cell in rows[0][1:]]
        gate = 1 / (1 + np.exp(q - p))
        expected = [100 * np.exp(p), 100 * np.exp(q), gate, 100 * part / float(block["todi"][0])]
        np.testing.assert_allclose(numbers, expected, atol=0.06)
        assert f"{block['teacher_nll'][0]:.3f}".rstrip("0") in seen.panel()


def test_colours_follow_the_measure_and_supervised_text_is_told_apart(view: Path, browser: Any) -> None:
    item = shown_sequence(3, with_student=True)
    labels = set((np.flatnonzero(item.sequence.target_mask) + 1).tolist())
    block = token_block([item], TokenTexts(None), temperature=1.0, beta=1.0)
    with opened(browser, view, "#seq=3") as seen:
        kinds = seen.page.locator(".tokens > span").evaluate_all("spans => spans.map(span => span.className)")
        assert {number for number, kind in enumerate(kinds) if kind.startswith("supervised")} == labels
        sides = ["high" if value >= 0.5 else "low" for value in block["label_gate"]]
        assert [kinds[label].split()[1] for label in sorted(labels)] == sides
        before = strengths(seen.page)
        seen.page.select_option("#colour", label="student NLL")
        assert strengths(seen.page) != before
        assert "or more" in seen.page.locator(".ends").inner_text()


def strengths(page: Any) -> list[str]:
    script = "all => all.map(span => span.style.getPropertyValue('--strength'))"
    return page.locator(".tokens > span").evaluate_all(script)


def test_hostile_tokens_are_text_and_ten_thousand_of_them_are_drawn(tmp_path: Path, browser: Any) -> None:
    vocabulary = {text: number for number, text in enumerate(HOSTILE)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="ok"))
    block = token_block([long_sequence(10_000)], TokenTexts(tokenizer), temperature=1.0, beta=1.0)
    with opened(browser, write(tmp_path, block), "#seq=0&tok=9990") as seen:
        spans = seen.page.locator(".tokens > span")
        assert spans.count() == 10_000
        assert spans.nth(0).inner_text() == HOSTILE[0]
        assert "⟨U+202E⟩evil" in spans.nth(2).inner_text()
        assert "\u202e" not in seen.page.content()
        assert seen.page.locator("#page script, #page img").count() == 0
        assert seen.page.title() == "A page"
        assert seen.panel().startswith("Token 9990:")
        seen.page.keyboard.press("ArrowRight")
        assert seen.panel().startswith("Token 9991:")


def long_sequence(num_tokens: int) -> ShownSequence:
    """Return a sequence of which every fourth token is supervised, by a teacher that is sure of nothing."""
    ids = (np.arange(num_tokens) % len(HOSTILE)).astype(np.uint32)
    mask = np.arange(num_tokens) % 4 == 1
    mask[-1] = False
    count = int(mask.sum())
    rows = TargetRows(
        ids=np.tile(np.arange(2, dtype=np.uint32), (count, 1)),
        logprobs=np.full((count, 2), np.log(0.25), np.float32),
        tail_logsumexp=np.full((count, 1), np.log(0.5), np.float32),
        label_logprob=np.full(count, np.log(0.2), np.float32),
        temperatures=(1.0,),
    )
    name = HOSTILE[0] + "\u202e"
    return ShownSequence(0, name, name, "random", CachedSequence(ids, mask, rows), None)


def test_hostile_names_and_texts_are_text_everywhere(tmp_path: Path, browser: Any) -> None:
    bad = HOSTILE[1]
    chart = lines(bad, bad, (bad, bad), [series(bad, [1.0, 2.0], [3.0, 4.0]), series("b", [1.0], [None])])
    rows = table([bad, "n"], [[bad, 1], ["b", None]])
    file = write(tmp_path, facts([(bad, bad)]), numbers([(bad, bad)]), rows, texts([(bad, [(bad, bad)])]), chart)
    with opened(browser, file) as seen:
        seen.page.wait_for_selector("svg.chart")
        assert seen.page.locator("#page img").count() == 0
        assert seen.page.content().count("&lt;img src=x") >= 10


def test_a_page_that_cannot_be_opened_says_so(tmp_path: Path, browser: Any) -> None:
    file = write(tmp_path, facts([]))
    html = file.read_text()
    start = html.index('id="data">') + len('id="data">')
    file.write_text(html[:start] + "AAAA" + html[html.index("</script>", start) :])
    page = browser.new_page()
    page.goto(file.as_uri())
    page.get_by_text("This page cannot be shown").wait_for()
    page.close()
