"""Our reader of GGUF against llama.cpp's own, on the sample; and against files that are damaged."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fleet.errors import ModelError
from fleet.toolchains.checkpoint.gguf_file import GgufFile
from fleet.toolchains.checkpoint.gguf_source import LlamaGguf


def test_every_value_and_every_weight_is_what_the_reader_of_llama_cpp_gives(sample_file: Path):
    gguf = pytest.importorskip("gguf")
    np = pytest.importorskip("numpy")
    ours, theirs = GgufFile(sample_file), gguf.GGUFReader(sample_file)
    assert ours.tensors == tuple(tensor.name for tensor in theirs.tensors)
    assert {key: theirs.get_field(key).contents() for key in ours.metadata} == ours.metadata
    for tensor in theirs.tensors:
        expected = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        assert np.array_equal(ours.tensor(tensor.name), expected), tensor.name


def test_a_file_that_is_cut_anywhere_is_an_error_that_names_it(sample_file: Path, tmp_path: Path):
    head = sample_file.read_bytes()[: 1 << 16]
    cut = tmp_path / "cut.gguf"

    @given(st.integers(0, len(head) - 1))
    @settings(max_examples=60)
    def check(length: int) -> None:
        cut.write_bytes(head[:length])
        with pytest.raises(ModelError, match=r"cut\.gguf"):
            LlamaGguf(cut)

    check()


@given(st.binary(max_size=400))
@settings(max_examples=200)
def test_random_bytes_are_never_more_than_a_value_error(tmp_path_factory: pytest.TempPathFactory, noise: bytes):
    path = tmp_path_factory.getbasetemp() / "noise.gguf"
    path.write_bytes(b"GGUF\x03\x00\x00\x00" + noise)
    with pytest.raises(ValueError):
        GgufFile(path)
