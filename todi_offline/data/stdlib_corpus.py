"""The documentation inside Python's standard library comes in; instruction/response pairs go out.

This is the default data set: about a million characters of English, without a download. It consists of the topics
behind `help("with")` and the docstrings of public classes, functions and methods. The same version of Python on the
same platform gives the same pairs in the same order.
"""

import functools
import hashlib
import importlib
import inspect
import math
import re
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType

from todi_offline.errors import DataError

SPLITS = ("train", "heldout")

MIN_CHARS = 220
"""Shorter documentation is left out: it says little more than the name."""

MAX_CHARS = 2400
"""Longer documentation is split into parts, between paragraphs."""

# Chosen by hand: importing these modules prints nothing, opens no window or browser, and leaves the terminal alone.
# A module that this Python lacks is skipped.
MODULES = """
    builtins os os.path sys io re abc argparse array ast asyncio atexit base64 bdb binascii bisect bz2
    calendar cmath cmd code codecs codeop collections collections.abc colorsys compileall concurrent.futures
    configparser contextlib contextvars copy copyreg csv ctypes curses curses.ascii curses.textpad
    dataclasses datetime dbm decimal difflib dis doctest email email.charset email.generator email.header
    email.message email.parser email.policy email.utils enum errno faulthandler fcntl filecmp fileinput
    fnmatch fractions ftplib functools gc getopt getpass gettext glob graphlib grp gzip hashlib heapq hmac
    html html.parser http http.client http.cookiejar http.cookies http.server imaplib importlib
    importlib.abc importlib.machinery importlib.metadata importlib.resources importlib.util inspect
    ipaddress itertools json json.decoder json.encoder linecache locale logging logging.config
    logging.handlers lzma mailbox marshal math mimetypes mmap modulefinder multiprocessing
    multiprocessing.managers multiprocessing.pool multiprocessing.shared_memory netrc numbers operator
    optparse pathlib pdb pickle pickletools pkgutil platform plistlib poplib pprint profile pstats pty pwd
    py_compile pyclbr pydoc queue quopri random reprlib resource runpy sched secrets select selectors shelve
    shlex shutil signal smtplib socket socketserver sqlite3 ssl stat statistics string struct subprocess
    symtable sysconfig tabnanny tarfile tempfile termios textwrap threading time timeit tokenize tomllib
    trace traceback tracemalloc types typing unicodedata unittest unittest.mock urllib.error urllib.parse
    urllib.request urllib.robotparser uuid venv warnings wave weakref webbrowser wsgiref.handlers
    wsgiref.headers wsgiref.simple_server wsgiref.util wsgiref.validate xml.dom.minidom xml.dom.pulldom
    xml.etree.ElementTree xml.sax xml.sax.handler xml.sax.saxutils xmlrpc.client xmlrpc.server zipapp
    zipfile zipimport zlib zoneinfo
"""

CALLABLE_QUESTIONS = (
    "What does the {kind} `{name}` do?",
    "Explain the Python {kind} `{name}`.",
    "How does `{name}` work in Python?",
    "I came across the {kind} `{name}` in some Python code. What is it for?",
    "Describe `{name}` as Python's own documentation would.",
    "Give a short reference for the {kind} `{name}`.",
)

TOPIC_QUESTIONS = (
    "What does the Python reference say about “{name}”?",
    "Explain “{name}” in Python.",
    "Write the section “{name}” of a guide to the Python language.",
    "I am learning Python. Teach me about “{name}”.",
)


@dataclass(frozen=True, slots=True)
class Pair:
    """An instruction, and the documentation that answers it; `id` is unique and the same in every run."""

    id: str
    instruction: str
    response: str


@dataclass(frozen=True, slots=True)
class _Entry:
    """A piece of documentation; entries with the same `key` belong to the same split."""

    id: str
    key: str
    kind: str
    name: str
    text: str


def stdlib_pairs(split: str = "train") -> list[Pair]:
    """Return the pairs of a split, `train` or `heldout` (about a tenth).

    A hash of the last part of a name decides the split, so `str.title` and `bytes.title` stay together.

    Raises:
        DataError: there is no such split.

    >>> next(pair.instruction for pair in stdlib_pairs() if pair.id == "textwrap.dedent")
    'How does `textwrap.dedent` work in Python?'
    """
    if split not in SPLITS:
        raise DataError(f"stdlib has no split {split!r}; its splits are {', '.join(SPLITS)}")
    return [pair for entry in _entries() if _split_of(entry.key) == split for pair in _pairs_of(entry)]


def _split_of(key: str) -> str:
    return "heldout" if _hash(f"split {key}") % 10 == 0 else "train"


def _pairs_of(entry: _Entry) -> Iterator[Pair]:
    questions = TOPIC_QUESTIONS if entry.kind == "topic" else CALLABLE_QUESTIONS
    question = questions[_hash(f"question {entry.id}") % len(questions)]
    question = question.format(kind=entry.kind, name=entry.name)
    parts = _parts(entry.text)
    if len(parts) == 1:
        yield Pair(entry.id, question, parts[0])
        return
    for number, part in enumerate(parts, 1):
        yield Pair(f"{entry.id}#{number}", f"{question} (part {number} of {len(parts)})", part)


@functools.cache
def _entries() -> tuple[_Entry, ...]:
    """Return all documentation, each text once: a text that several names share belongs to the first name."""
    by_text: dict[str, _Entry] = {}
    for entry in (*_topics(), *_callables()):
        if len(entry.text) >= MIN_CHARS:
            by_text.setdefault(entry.text, entry)
    return tuple(by_text.values())


def _topics() -> Iterator[_Entry]:
    """Yield the sections of pydoc's topics, not the topics: topics overlap, and sections can be told apart."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        return
    for topic, text in sorted(topics.items()):
        body, *_ = text.partition("-[ Footnotes ]-")
        body = re.sub(r"(?m)^ *(\+[-=+]+|\|.*\|)\n", "", body)  # tables, drawn with characters
        _, *sections = re.split(r"(?m)^(\S.*)\n[*=\-~^]{4,}\n", body)
        for title, section in zip(sections[::2], sections[1::2], strict=True):
            name = title.replace('"', "`")
            yield _Entry(f"topics/{topic}/{name}", key=name, kind="topic", name=name, text=_clean(section))


def _callables() -> Iterator[_Entry]:
    for path, module in _modules():
        prefix = "" if path == "builtins" else f"{path}."
        for name in _public_names(module):
            value = getattr(module, name, None)
            if inspect.isclass(value):
                kind = "exception" if issubclass(value, BaseException) else "class"
                yield from _documented(f"{prefix}{name}", kind, value)
                for attribute, member in _methods(value):
                    yield from _documented(f"{prefix}{name}.{attribute}", "method", member)
            elif callable(value):
                yield from _documented(f"{prefix}{name}", "function", value)


def _modules() -> Iterator[tuple[str, ModuleType]]:
    for path in MODULES.split():
        with warnings.catch_warnings(action="ignore"):  # some modules are deprecated in some versions of Python
            try:
                module = importlib.import_module(path)
            except ImportError:
                continue
        yield path, module


def _public_names(module: ModuleType) -> list[str]:
    """Return the names in `__all__` of a module, or the names that the module defines."""
    if hasattr(module, "__all__"):
        return sorted(set(module.__all__))
    return sorted(name for name, value in vars(module).items() if _home(value) == module.__name__)


def _home(value: object) -> str | None:
    return getattr(value, "__module__", None)


def _methods(cls: type) -> list[tuple[str, object]]:
    return [
        (name, member)
        for name, member in sorted(vars(cls).items())
        if inspect.isroutine(getattr(member, "__func__", member))
    ]


def _documented(name: str, kind: str, value: object) -> Iterator[_Entry]:
    *_, last = name.split(".")
    text = getattr(value, "__doc__", None)
    if isinstance(text, str) and not last.startswith("_") and _is_original(last, value):
        yield _Entry(name, key=last, kind=kind, name=name, text=_clean(text))


def _is_original(name: str, value: object) -> bool:
    """Tell whether an object came with Python: packages add others to its modules, and replace hooks, when imported."""
    package, *_ = (_home(value) or "builtins").split(".")
    return package in sys.stdlib_module_names and not name.endswith("hook")


def _clean(text: str) -> str:
    lines = (line.rstrip() for line in inspect.cleandoc(text).splitlines())
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()


def _parts(text: str) -> list[str]:
    """Split a long text between paragraphs into parts of similar length; a block joins the part where its middle is."""
    num_parts = math.ceil(len(text) / MAX_CHARS)
    parts = [""] * num_parts
    end = 0
    for block in _blocks(text):
        parts[(2 * end + len(block)) * num_parts // (2 * len(text))] += block
        end += len(block)
    return [part.strip("\n") for part in parts if part.strip()]


def _blocks(text: str) -> Iterator[str]:
    """Yield the paragraphs of a text with the blank lines after them; a very long paragraph line by line."""
    for paragraph in re.findall(r"(?s).+?(?:\n\n|\Z)", text):
        yield from [paragraph] if len(paragraph) <= MAX_CHARS // 2 else paragraph.splitlines(keepends=True)


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
