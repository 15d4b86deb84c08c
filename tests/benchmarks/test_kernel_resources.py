import re
from pathlib import Path

import pytest

from benchmarks.kernel_resources import access_widths, parse_usage
from benchmarks.test_kernel_resources import span, summarised

ROOT = Path(__file__).parents[2]

USAGE = """
Resource usage:
 Common:
  GLOBAL:0
 Function _forward_kernel:
  REG:42 STACK:0 SHARED:0 LOCAL:0 CONSTANT[0]:600 TEXTURE:0 SURFACE:0 SAMPLER:0
"""

PTX = """
	ld.param.b64 	%rd3, [_forward_kernel_param_2];
	@%p1 ld.global.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd1 + 0 ];
	@%p1 ld.global.L1::evict_last.v2.b64 { %rd5, %rd6 }, [ %rd1 + 0 ];
	ld.global.b16 { %rs1 }, [ %rd2 + 0 ];
	ld.shared.v4.b32 {%r5, %r6, %r7, %r8}, [%r9];
	@%p2 st.global.v4.b32 [ %rd4 + 0 ], { %r1, %r2, %r3, %r4 };
	st.global.f32 [ %rd4 + 0 ], { %f1 };
	st.shared.b8 [%r9], %rs1;
"""


def test_usage_is_what_cuobjdump_prints():
    assert parse_usage(USAGE) == {"registers": 42, "stack": 0, "local": 0}


def test_of_several_functions_the_most_counts():
    more = USAGE + " Function helper:\n  REG:20 STACK:16 SHARED:0 LOCAL:8\n"
    assert parse_usage(more) == {"registers": 42, "stack": 16, "local": 8}


def test_usage_of_nothing_is_an_error():
    with pytest.raises(ValueError, match="names no function"):
        parse_usage("Resource usage:\n Common:\n  GLOBAL:0\n")


def test_widths_are_those_of_global_accesses():
    assert access_widths(PTX, "ld") == [2, 16]
    assert access_widths(PTX, "st") == [4, 16]
    assert access_widths("", "ld") == []


def test_span_shows_one_number_where_there_is_one():
    assert span([16]) == "16"
    assert span([2, 4, 16]) == "2-16"


def rows(registers=30, layouts=("contiguous", "channels-last"), **changes):
    """Of one operator; a binary for every dtype and target."""
    return [
        {
            "operator": "sum",
            "pass": "forward",
            "layout": layout,
            "dtype": dtype,
            "target": target,
            "registers": registers if target == "sm_80" else 20,
            "shared": 0,
            "loads": [16],
            "stores": [4, 16],
            "bytes_per_element": 8.0,
            "binary": f"{dtype} {target}",
            **changes,
        }
        for layout in layouts
        for dtype in ("float32", "bfloat16")
        for target in ("sm_80", "sm_90")
    ]


PLAIN = [
    {"operator": operator, "pass": "forward", "dtype": dtype, "bytes_per_element": moved}
    for operator in ("sum", "difference")
    for dtype, moved in (("float32", 20.0), ("bfloat16", 10.0))
]


def test_the_summary_takes_the_most_registers_and_one_row_where_layouts_agree():
    (found,) = summarised(rows(registers=44), PLAIN)
    assert found["layout"] == "any"
    assert (found["registers"], found["registers_bf16"]) == (44, 44)
    assert (found["widths"], found["bytes"], found["plain"], found["plain_bf16"]) == ("16; 4-16", 8.0, 20.0, 10.0)


def test_the_summary_keeps_layouts_apart_that_differ():
    apart = rows(layouts=("contiguous",)) + rows(layouts=("channels-last",), shared=512, binary="other")
    assert [(r["layout"], r["shared"]) for r in summarised(apart, PLAIN)] == [("contiguous", 0), ("channels-last", 512)]


def test_the_summary_shows_once_what_two_operators_launch():
    assert [r["operator"] for r in summarised(rows() + rows(operator="difference"), PLAIN)] == ["sum"]


def test_the_included_tables_are_the_measured_ones():
    page = (ROOT / "docs" / "kernels.md").read_text()
    included = dict(re.findall(r"<!-- begin (\w+) -->\n(.*?)\n?<!-- end \1 -->", page, re.DOTALL))
    for name in ("kernel_resources", "profile"):
        assert included[name]
        assert included[name] in (ROOT / "benchmarks" / "results" / f"{name}.md").read_text()
