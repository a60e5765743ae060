"""tests/counts.py: what it counts. `make lint` counts the files themselves."""

from __future__ import annotations

import counts
import pytest

SOURCE = r"""// a comment; and another; with ? and ?
/* one; more; ?
 * of them; ? */
int add(int a, int b) { a += b; return a; }

static int f(void) {
    char c = '?'; // and '; ?
    const char *s = "a ? b; c; // \" ?";
    for (int i = 0, n = g(1); i < n; i++)
        c += i ? 1 : 2;
    for (size_t i = 0; i < max(a, b);
         i++)
        call(i);
    a = 1; b = 2;
    for (;;) { x(); y(); }
    return c ? *s : 0;
}
// 5 The tokenizer
int last;
"""


def test_what_a_line_has() -> None:
    assert counts.code_lines(SOURCE) == 14
    assert counts.code_lines(counts.model_part(SOURCE)) == 13
    assert counts.bare(SOURCE).count("?") == 2
    assert counts.bare(SOURCE).count("\n") == SOURCE.count("\n")
    assert counts.crowded_lines(SOURCE) == [14, 15]
    assert counts.wide_lines("x" * 120 + "\n" + "é" * 121 + "\n") == [2]


def found(**files: str) -> list[str]:
    """What is too much in these files."""
    texts = {"run.c": "// 5 \n", "README.md": "", "export.py": ""} | {
        name.replace("_", "."): text for name, text in files.items()
    }
    return [count.what for count in counts.counts(texts.__getitem__) if count.found > count.limit]


@pytest.mark.parametrize(
    ("file", "good", "more", "what"),
    [
        ("run_c", "a\n" * 500 + "// 5 \n", "a\n", "run.c: code lines of sections 1 to 4"),
        ("run_c", "// 5 \n" + "a\n" * counts.RUN_LINES, "a\n", "run.c: code lines"),
        ("run_c", "// 5 \n" + "a\n" * 96 + "a ? b : c\n" * 4, "? :\n", "run.c: ternaries per 100 code lines"),
        ("run_c", "// 5 \na;\n", "a; b;\n", "run.c: lines of more than one statement"),
        ("run_c", "// 5 \n", "a" * 121 + "\n", "run.c: lines of more than 120 columns"),
        ("README_md", "", "a" * 121 + "\n", "README.md: lines of more than 120 columns"),
        ("README_md", "a\n" * 350, "\n", "README.md: lines"),
        ("export_py", "a\n" * counts.EXPORT_LINES, "\n", "export.py: lines"),
    ],
)
def test_each_limit(file: str, good: str, more: str, what: str) -> None:
    assert found(**{file: good}) == []
    assert found(**{file: more + good}) == [what]


def test_a_file_without_its_sections() -> None:
    with pytest.raises(SystemExit, match="'// 5 '"):
        found(run_c="int main;\n")
