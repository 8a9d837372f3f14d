"""References parse to what they mean, or are refused with the syntax."""

from pathlib import Path

import pytest

from models.catalog import catalog
from models.reference import (
    HubReference,
    InvalidName,
    InvalidReference,
    LocalReference,
    PackageReference,
    check_name,
    new_name,
    parse,
)

HUB = {
    "hf:org/name": ("org/name", None, None, None, "name"),
    "hf:gpt2": ("gpt2", None, None, None, "gpt2"),
    "hf:org/name@v1.0": ("org/name", None, None, "v1.0", "name"),
    "hf:org/name@refs/pr/3": ("org/name", None, None, "refs/pr/3", "name"),
    "hf:org/Name-GGUF:Q4_K_M": ("org/Name-GGUF", None, "Q4_K_M", None, "Name-Q4_K_M"),
    "hf:org/name/sub/file.gguf@main": ("org/name", "sub/file.gguf", None, "main", "file"),
}


@pytest.mark.parametrize("text", HUB)
def test_hub_references_parse(text):
    found = parse(text)
    assert isinstance(found, HubReference)
    assert (found.repo, found.file, found.variant, found.revision, found.default_name) == HUB[text]


def test_package_references_parse():
    found = parse("pypi:some-pkg==1.2.3#some_pkg/model.gguf?sha256=" + "a" * 64)
    assert isinstance(found, PackageReference)
    assert (found.first.package, found.first.version, found.first.member) == (
        "some-pkg", "1.2.3", "some_pkg/model.gguf",
    )  # fmt: skip
    assert (found.sha256, found.default_name) == ("a" * 64, "model")


def test_a_range_of_packages_becomes_numbered_parts():
    found = parse("pypi:part{9..11}==0.1#part_{n}/p{n:02}.bin?file=whole.gguf")
    assert isinstance(found, PackageReference)
    assert [(p.package, p.member) for p in found.parts] == [
        ("part9", "part_9/p09.bin"),
        ("part10", "part_10/p10.bin"),
        ("part11", "part_11/p11.bin"),
    ]
    assert (found.file, found.default_name) == ("whole.gguf", "whole")


def test_paths_parse_to_local_references(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    for text in ("here", "./here", "file:here", f"file://{tmp_path}/here"):
        found = parse(text)
        assert isinstance(found, LocalReference)
        assert found.path == Path(tmp_path, "here")
    assert parse("not-here") is None


@pytest.mark.parametrize(
    "text",
    [
        "hf:",
        "hf:org/name/model.bin",
        "hf:org/name/pytorch_model.pt@main",
        "hf:org/../name",
        "hf:org/name/f.gguf:Q4_0",
        "pypi:name",
        "pypi:name>=1#x",
        "pypi:name==1#x?sha256=zz",
        "pypi:name==1#x?colour=red",
        f"pypi:name==1#folder?sha256={'0' * 64}",
        "pypi:p{1..3}==1#a/{n}.bin",
        "pypi:p{1..3}==1#a/x.bin?file=f",
        "pypi:p{3..1}==1#a/{n}.bin?file=f",
        "pypi:-r==1#x",
        "file:",
        f"pypi:name==1#m.gguf?sha256={'0' * 64}&sha256={'1' * 64}",
        f"pypi:name==1#m.gguf?sha256={'0' * 64}&file=a.gguf&file=b.gguf",
        "pypi:name==1#m.gguf?sha256",
        f"hf:org/name/m.gguf?sha256={'0' * 64}",
        f"hf:org/name?sha256={'0' * 64}",
        f"file:/nowhere/m.gguf?sha256={'0' * 64}",
        f"./nowhere/folder?sha256={'0' * 64}",
        "https://example.org/m.gguf",
        f"https://example.org/m.gguf?sha256={'0' * 64}",
    ],
)
def test_what_does_not_parse_is_refused_with_the_syntax(text):
    with pytest.raises(InvalidReference, match="a reference is a catalogue name"):
        parse(text)


def test_a_path_that_looks_like_it_had_options_is_still_a_path(tmp_path):
    odd = tmp_path / "m.gguf?file=x"
    odd.write_bytes(b"")
    found = parse(f"file:{odd}")
    assert isinstance(found, LocalReference)
    assert found.path == odd


def test_only_a_name_that_nobody_gave_is_told_to_be_given():
    with pytest.raises(InvalidName, match="give one with --name"):
        new_name(None, "a b")
    with pytest.raises(InvalidName) as failure:
        new_name("a b", "fine")
    assert "--name" not in str(failure.value)


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../x", "a/b", "a\\b", "-x", ".hidden", "a b", "x" * 129, "a..b", "a."]
)
def test_names_that_could_leave_the_store_are_refused(name):
    with pytest.raises(InvalidName):
        check_name(name)


def test_every_catalogue_entry_is_usable():
    entries = catalog()
    assert {"smollm2-135m-instruct", "qwen2.5-coder-1.5b-instruct", "all-minilm-l6-v2"} <= entries.keys()
    for name, entry in entries.items():
        assert check_name(name) == name
        assert entry.description
        assert entry.licence
        assert entry.size_bytes > 1e6
        if isinstance(entry.reference, PackageReference):
            assert entry.reference.sha256 or entry.reference.files
