"""The data of pages: their numbers, escaped texts, and the same bytes for the same input."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from support.fake_cache import VOCAB, edit_root, write_cache
from support.pages import page_data, shown_sequence, student_logprobs
from support.tiny import tiny_tokenizer
from support.tools import run
from tokenizers import Tokenizer, decoders, models

from todi_offline.cache.reader import open_cache
from todi_offline.evaluation.distance import position_in_response as reference_positions
from todi_offline.losses.divergences import forward_kl, reverse_kl, todi
from todi_offline.pages.blocks import facts, histogram, texts
from todi_offline.pages.cache_page import cache_page, describe_cache, position_in_response
from todi_offline.pages.choosing import shown_sequences
from todi_offline.pages.gate import divide, entropy_bound, gate, teacher_entries
from todi_offline.pages.page import SCRIPTS, Page, Section
from todi_offline.pages.texts import TokenTexts, printable
from todi_offline.pages.tokens import token_block

FOLDER = Path(__file__).parent.parent / "todi_offline" / "pages"
HOSTILE = '<script>alert(1)</script> & "quoted"</title>'


def page_of(*blocks: dict) -> Page:
    return Page("A page", [Section("A section", "", list(blocks))])


def texts_of_tiny() -> TokenTexts:
    return TokenTexts(tiny_tokenizer().backend_tokenizer)


@pytest.mark.parametrize("beta", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_gate_and_the_divergences_equal_those_of_the_losses(beta: float, temperature: float) -> None:
    item = shown_sequence(3, with_student=True)
    kept, tail, _ = teacher_entries(item.sequence.targets, temperature)
    p = np.column_stack([kept, tail])
    q = np.column_stack([item.student.kept, item.student.tail])
    parts = divide(p, q, beta)
    teacher, student = torch.from_numpy(p), torch.from_numpy(q)
    np.testing.assert_allclose(parts.todi.sum(1), todi(teacher, student, beta).numpy(), rtol=1e-9)
    np.testing.assert_allclose(parts.forward_kl, forward_kl(teacher, student).numpy(), atol=1e-6)
    np.testing.assert_allclose(parts.reverse_kl, reverse_kl(teacher, student).numpy(), atol=1e-6)
    opened = torch.sigmoid(beta * (teacher - student))
    np.testing.assert_allclose(gate(p, q, beta), opened.numpy(), rtol=1e-9)
    np.testing.assert_allclose(parts.mean_gate, (teacher.exp() * opened).sum(-1).numpy(), rtol=1e-5)
    assert (parts.todi >= 0).all()


def test_teacher_entries_sum_to_one_at_every_temperature_and_bound_the_entropy() -> None:
    rows = shown_sequence(4, with_student=False).sequence.targets
    for temperature in rows.temperatures:
        kept, tail, _ = teacher_entries(rows, temperature)
        np.testing.assert_allclose(np.exp(kept).sum(1) + np.exp(tail), 1, rtol=1e-9)
        assert (entropy_bound(kept, tail) > 0).all()
        assert (entropy_bound(kept, tail) < np.log(VOCAB)).all()


def test_the_entries_of_a_target_and_the_rest_hold_all_mass_and_all_of_the_divergence() -> None:
    item = shown_sequence(5, with_student=True)
    block = token_block([item], TokenTexts(None), temperature=1.0, beta=1.0)
    ids, vocabulary = block["entry_ids"].astype(int), block["vocabulary"]["ids"]
    everything = student_logprobs(item.sequence, seed=5)
    for target in range(len(ids)):
        known = ids[target] < len(vocabulary)
        numbers = vocabulary[ids[target][known]]
        assert len(set(numbers)) == len(numbers)
        q = np.exp(everything[target])
        np.testing.assert_allclose(np.exp(block["entry_q"][target][known]), q[numbers], rtol=4e-3)
        in_tail = np.isnan(block["entry_p"][target])
        shown_q = np.exp(block["entry_q"][target][known & ~in_tail]).sum()
        assert shown_q + block["rest_q"][target].sum() == pytest.approx(1, rel=2e-3)
        shown_p = np.nansum(np.exp(block["entry_p"][target]))
        assert shown_p + block["rest_p"][target].sum() == pytest.approx(1, rel=2e-3)
        parts = np.nansum(block["entry_part"][target]) + block["rest_part"][target].sum()
        assert parts == pytest.approx(float(block["todi"][target]), rel=2e-3)
    labels = item.sequence.token_ids[block["labels"]]
    expected = -everything[np.arange(len(labels)), labels.astype(int)]
    np.testing.assert_allclose(block["student_nll"], expected, rtol=1e-3)


def test_positions_in_the_response_equal_those_of_the_evaluation() -> None:
    mask = np.array([0, 1, 1, 0, 0, 1, 0, 1, 1, 1, 0], np.bool_)
    np.testing.assert_array_equal(position_in_response(mask), reference_positions(np.flatnonzero(mask)))


def test_a_page_holds_its_values_to_the_bit() -> None:
    arrays = [np.arange(5, dtype=np.uint8), np.array([[1.5, np.nan], [-np.inf, 2]], np.float32), np.array([7], "u4")]
    html = page_of(
        {"kind": "x", "one": arrays[0], "two": {"deep": arrays[1]}, "three": [arrays[2], float("nan")]}
    ).to_html()
    values, found = page_data(html)
    block = values["sections"][0]["blocks"][0]
    assert block == {"kind": "x", "one": {"array": 0}, "two": {"deep": {"array": 1}}, "three": [{"array": 2}, None]}
    for array, expected in zip(found, arrays, strict=True):
        np.testing.assert_array_equal(array, expected)


def test_the_policy_allows_the_style_and_the_script_of_the_page_and_nothing_else() -> None:
    html = page_of(facts([])).to_html()
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', html)[1]
    allowed = dict(part.strip().split(" ", 1) for part in policy.split(";"))
    assert allowed["default-src"] == allowed["base-uri"] == "'none'"
    assert re.fullmatch(r"'sha256-[\w+/]{43}='", allowed["script-src"])
    assert re.fullmatch(r"'sha256-[\w+/]{43}='", allowed["style-src"])
    assert not re.search(r"(src|href)=[\"']", html)
    assert html.count("<script") == 2


def test_a_hostile_text_is_nowhere_in_the_markup() -> None:
    html = Page(HOSTILE, [Section(HOSTILE, HOSTILE, [texts([(HOSTILE, [(HOSTILE, HOSTILE)])])])]).to_html()
    assert "<script>alert" not in html
    assert html.count("</title>") == 1
    assert page_data(html)[0]["title"] == HOSTILE


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain, Ünïcode, 漢字, 🦆", "plain, Ünïcode, 漢字, 🦆"),
        ("a\u202eb", "a⟨U+202E⟩b"),
        ("\u2066x\u2069\u200f", "⟨U+2066⟩x⟨U+2069⟩⟨U+200F⟩"),
        ("bell\x07 nul\x00 esc\x1b[31m", "bell⟨U+0007⟩ nul⟨U+0000⟩ esc⟨U+001B⟩[31m"),
        ("line\n\ttab\r", "line\n\ttab⟨U+000D⟩"),
        ("no\u00a0break\u2028\ufeff\u200b", "no⟨U+00A0⟩break⟨U+2028⟩⟨U+FEFF⟩⟨U+200B⟩"),
        ("\ud800", "⟨U+D800⟩"),
    ],
)
def test_invisible_characters_are_written_by_name(text: str, expected: str) -> None:
    assert printable(text) == expected
    assert page_data(page_of(facts([(text, text)])).to_html())[0]["sections"][0]["blocks"][0]["rows"] == [
        [expected] * 2
    ]


def test_pieces_of_one_character_are_joined_and_the_text_is_the_whole_text() -> None:
    tokenizer = tiny_tokenizer()
    text = "naïve 漢字 🦆 <b>done</b>\n"
    ids = tokenizer(text)["input_ids"]
    pieces = texts_of_tiny().pieces(ids)
    assert "".join(piece.text for piece in pieces) == text
    assert sum(piece.num_tokens for piece in pieces) == len(ids)
    assert {"漢": 3, "字": 3, "🦆": 4}.items() <= {piece.text: piece.num_tokens for piece in pieces}.items()


def test_bytes_that_never_become_a_character_are_shown_as_bytes() -> None:
    tokenizer = tiny_tokenizer()
    duck = tokenizer("🦆")["input_ids"]
    found = texts_of_tiny()
    assert [found.of_id(number) for number in duck] == ["\\xF0", "\\x9F", "\\xA6", "\\x86"]
    pieces = found.pieces([*duck[:2], *tokenizer("ok")["input_ids"]])
    assert pieces[0].text == "\\xF0"
    assert "".join(piece.text for piece in pieces).endswith("ok")


def test_a_decoder_that_takes_the_first_space_away_loses_none_inside() -> None:
    vocabulary = {
        name: number for number, name in enumerate(["<unk>", "▁the", "▁cat", "s", "<0xE2>", "<0x98>", "<0x83>"])
    }
    tokenizer = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True, unk_token="<unk>"))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    found = TokenTexts(tokenizer)
    assert [piece.text for piece in found.pieces([1, 2, 3, 4, 5, 6, 2])] == ["the", " cat", "s", "☃", " cat"]
    assert [found.of_id(number) for number in (2, 3, 4)] == [" cat", "s", "\\xE2"]


def test_without_a_tokenizer_ids_are_shown() -> None:
    found = TokenTexts(None)
    assert found.of_id(7) == "[7]"
    assert [piece.text for piece in found.pieces([7, 8])] == ["[7] ", "[8] "]


def test_the_sequences_shown_are_a_sample_and_the_worst_within_the_budget(tmp_path: Path) -> None:
    cache = open_cache(write_cache(tmp_path / "cache", num_shards=4))
    costs = {"bytes_per_token": 10.0, "bytes_per_target": 100.0}
    few = shown_sequences(cache, None, **costs, budget_mb=0.04)
    first = {item.why: item.number for item in reversed(few)}
    assert first["highest teacher NLL"] == cache.columns["teacher_nll"].argmax()
    assert first["least kept mass"] == cache.columns["topk_mass"].argmin()
    assert {item.why for item in few} == {"highest teacher NLL", "least kept mass", "random"}
    numbers = np.array([item.number for item in few])
    assert (10.0 * cache.num_tokens[numbers] + 100.0 * cache.num_targets[numbers]).sum() <= 40_000
    assert few == shown_sequences(cache, None, **costs, budget_mb=0.04)
    assert len(shown_sequences(cache, None, **costs, budget_mb=1e-9)) == 1
    assert len(shown_sequences(cache, None, **costs, budget_mb=100)) == len(cache)
    named = shown_sequences(cache, np.array([5, 2]), **costs)
    assert [(item.number, item.why) for item in named] == [(5, "chosen"), (2, "chosen")]


def test_histograms_count_every_value_once() -> None:
    for values in (np.array([3, 3, 3]), np.arange(1000), np.linspace(0, 1, 77), np.array([0.5])):
        block = histogram("", "", ("", ""), values)
        assert sum(block["counts"]) == len(values)
        assert len(block["edges"]) == len(block["counts"]) + 1


def test_a_histogram_that_nearly_begins_at_zero_begins_there() -> None:
    assert histogram("", "", ("", ""), np.linspace(0.01, 3, 50))["edges"][0] == 0
    assert histogram("", "", ("", ""), np.linspace(1, 3, 50))["edges"][0] == 1


def test_view_writes_the_same_bytes_twice_and_its_numbers_as_json(tmp_path: Path) -> None:
    root = write_cache(tmp_path / "cache")
    assert "bytes" in run("view", root, "--out", tmp_path / "a.html").output
    numbers = json.loads(run("view", root, "--out", tmp_path / "b.html", "--json").stdout)
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()
    sections = {section["title"]: section for section in numbers["sections"]}
    cache = open_cache(root)
    assert len(sections["Sequences"]["blocks"][0]["rows"]) == len(cache)
    view = sections["Text"]["blocks"][0]
    first = cache[view["sequences"][0]["number"]]
    count = view["sequences"][0]["num_targets"]
    np.testing.assert_allclose(view["teacher_nll"][:count], -first.targets.label_logprob, rtol=1e-3)
    coverage = sections["What it holds"]["blocks"][0]["series"][0]
    every = np.concatenate([np.exp(sequence.targets.logprobs.astype(float)) for sequence in cache])
    np.testing.assert_allclose(coverage["y"], every.cumsum(1).mean(0), rtol=1e-4)


def test_the_page_describes_the_capture_without_the_chat_template(tmp_path: Path) -> None:
    root = write_cache(tmp_path / "cache")
    edit_root(root, lambda values: values["manifest"]["parts"][0]["recipe"].update(limit=9, chat_template="{{ x }}"))
    described = dict(describe_cache(open_cache(root)))
    assert described["Data"] == "24 sequences: source fake, limit 9"


def test_view_shows_the_sequences_that_are_named(tmp_path: Path) -> None:
    root = write_cache(tmp_path / "cache")
    (tmp_path / "ids.txt").write_text("fake:7\nfake:3\n")
    out = tmp_path / "page.html"
    found = json.loads(run("view", root, "--out", out, "--ids", tmp_path / "ids.txt", "--json").stdout)
    shown = next(section for section in found["sections"] if section["title"] == "Text")["blocks"][0]["sequences"]
    assert [item["id"] for item in shown] == ["fake:3", "fake:7"]


def test_the_data_of_the_text_fit_the_budget(tmp_path: Path) -> None:
    cache = open_cache(write_cache(tmp_path / "cache", num_shards=3, per_shard=30, k=32))
    html = cache_page(cache, budget_mb=0.1).to_html()
    rest = cache_page(cache, budget_mb=1e-9).to_html()
    assert 30_000 < len(html) - len(rest) < 200_000


def test_view_imports_no_torch(tmp_path: Path) -> None:
    root, out = write_cache(tmp_path / "cache"), tmp_path / "page.html"
    code = (
        f"import sys; from cache_tools.__main__ import cli; cli(['view', {str(root)!r}, '--out', {str(out)!r}], "
        "standalone_mode=False); sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_scripts_keep_to_the_style_and_never_parse_markup(name: str) -> None:
    text = (FOLDER / name).read_text()
    assert max(map(len, text.splitlines())) <= 120
    assert text.endswith("\n")
    assert not re.search(r"[ \t]+$", text, re.MULTILINE)
    forbidden = (
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|Function\(|fetch\(|XMLHttpRequest|</script"
    )
    assert not re.search(forbidden, text)
    assert not re.search(r"\bvar\b|[^=!]==[^=]|!=[^=]", text)
