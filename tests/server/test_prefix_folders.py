"""Folders of saved prefixes: claimed by live servers, deleted when none of them can use them."""

import logging
from pathlib import Path

import pytest

from server.prefix_folders import Claims


@pytest.fixture
def parent(tmp_path) -> Path:
    return tmp_path / "cache" / "prefixes"


def left_behind(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "one.state").write_bytes(b"x" * 1_500_000)
    return folder


def test_what_no_live_server_has_claimed_is_deleted_and_told(parent, caplog):
    gone, mine = left_behind(parent / "gone"), left_behind(parent / "mine")
    (parent / "notes.txt").write_text("mine")
    with caplog.at_level(logging.INFO, "lq.server"):
        claims = Claims([mine])
    assert not gone.exists()
    assert "1.5 MB of saved prefixes" in caplog.text
    assert (mine / "one.state").exists()
    assert (parent / "notes.txt").exists()
    claims.close()


def test_another_live_servers_folders_stay_until_it_ends(parent):
    theirs = left_behind(parent / "theirs")
    other = Claims([theirs])
    Claims([parent / "mine"]).close()
    assert (theirs / "one.state").exists()
    other.close()
    Claims([parent / "mine"]).close()
    assert not theirs.exists()


def test_two_servers_may_claim_the_same_folder(parent):
    one, two = Claims([parent / "both"]), Claims([parent / "both"])
    one.close()
    Claims([parent / "third"]).close()
    assert (parent / "both").exists(), "the second one has it"
    two.close()


def test_a_server_without_saved_prefixes_touches_nothing(parent):
    left_behind(parent / "others")
    Claims([]).close()
    assert (parent / "others").exists()


def test_a_link_is_not_followed(parent, tmp_path):
    outside = left_behind(tmp_path / "outside")
    parent.mkdir(parents=True)
    (parent / "link").symlink_to(outside)
    Claims([parent / "mine"]).close()
    assert (outside / "one.state").exists()
