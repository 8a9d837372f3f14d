"""[keys.NAME] and [limits]: what is read, what is refused, and which limit holds for whom."""

import hashlib

import pytest

from server.auth import read_keys
from server.errors import Unauthorized
from server.key_settings import DIGEST_OF_NOTHING, Key, Limits, policy
from server.limits import Policy
from server.settings import HTTP, Settings, SettingsError, load

SECRET = "a-secret-that-must-not-show"


def digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


@pytest.fixture(autouse=True)
def _no_key(monkeypatch):
    monkeypatch.delenv("LQ_API_KEY", raising=False)


def test_a_digest_in_the_file_lets_its_key_in_under_the_tables_name(written):
    of_alice, of_bob = digest("key-of-alice").upper(), digest("b")
    text = f'[keys.alice]\nkey_sha256 = "{of_alice}"\n[keys.bob]\nkey_sha256 = "{of_bob}"\n'
    keys = read_keys(load(written(text)))
    assert keys.required
    assert keys.check("Bearer key-of-alice") == "alice"
    assert keys.check("Bearer b") == "bob"
    assert keys.names == ("alice", "bob")
    for wrong in (
        "Bearer alice",
        f"Bearer {digest('key-of-alice')}",
        "Bearer",
        "",
        None,
        "Basic key-of-alice",
    ):
        with pytest.raises(Unauthorized):
            keys.check(wrong)


def test_a_named_key_opens_the_door_to_other_machines():
    settings = Settings(server=HTTP(host="0.0.0.0"), keys={"a": Key(key_sha256=digest("x"))})
    assert read_keys(settings).check("Bearer x") == "a"


def test_keys_of_file_and_environment_are_named_by_where_they_stand(tmp_path, monkeypatch):
    (tmp_path / "keys").write_text("# comment\nkey-on-two\n\nkey-on-four\nkey-on-two\nkey-of-alice\n")
    monkeypatch.setenv("LQ_API_KEY", "key-of-env")
    settings = Settings(
        server=HTTP(api_key_file=str(tmp_path / "keys")),
        keys={"alice": Key(key_sha256=digest("key-of-alice"))},
    )
    keys = read_keys(settings)
    assert keys.names == ("alice", "api_key_file:2", "api_key_file:4", "LQ_API_KEY")
    assert keys.check("Bearer key-on-four") == "api_key_file:4"
    assert keys.check("Bearer key-of-env") == "LQ_API_KEY"
    assert keys.check("Bearer key-of-alice") == "alice"  # with its limits, wherever it stands beside


def test_without_keys_everybody_asks_under_the_empty_name():
    keys = read_keys(Settings())
    assert keys.names == ("",)
    assert keys.check(None) == keys.check("Bearer anything") == ""


@pytest.mark.parametrize("name", ["LQ_API_KEY", "api_key_file:1"])
def test_a_table_cannot_take_the_name_of_another_key(name, tmp_path, monkeypatch):
    monkeypatch.setenv("LQ_API_KEY", "key-of-env")
    (tmp_path / "keys").write_text("key-of-file")
    settings = Settings(
        server=HTTP(api_key_file=str(tmp_path / "keys")), keys={name: Key(key_sha256=digest("x"))}
    )
    with pytest.raises(SettingsError, match=f"keys.{name}: .* choose another"):
        read_keys(settings)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (f'key_sha256 = "{SECRET}"', ["keys.a.key_sha256", f"{len(SECRET)} characters", "sha256sum"]),
        (f'key_sha256 = "{"g" * 64}"', ["keys.a.key_sha256", "64 hex digits", "sha256sum"]),
        (f'key_sha256 = "{DIGEST_OF_NOTHING}"', ["keys.a.key_sha256", "empty key", "sha256sum"]),
        ("key_sha256 = 12345678", ["keys.a.key_sha256", "expected `str`"]),
        ("weight = 2", ["keys.a", "`key_sha256`"]),
        (f'key = "{SECRET}"', ["`keys.a.key`", "known:", "key_sha256"]),
        ("weight = 0", ["`keys.a.weight`", ">= 0.01", "it is 0"]),
        ("weight = nan", ["`keys.a.weight`", "it is nan"]),
        ("weight = 1001", ["`keys.a.weight`", "<= 1000"]),
        ("priority = 1.5", ["`keys.a.priority`", "int"]),
        ("priority = 1001", ["`keys.a.priority`", "<= 1000", "it is 1001"]),
        ("max_requests = 0", ["`keys.a.max_requests`", ">= 1", "it is 0"]),
        ("max_running = 257", ["`keys.a.max_running`", "<= 256", "it is 257"]),
        ("tokens_per_minute = -5", ["`keys.a.tokens_per_minute`", ">= 1", "it is -5"]),
        ("tokens_per_minute = true", ["`keys.a.tokens_per_minute`", "bool"]),
        ('tokens_per_minute = "none"', ["`keys.a.tokens_per_minute`", "invalid enum value 'none'"]),
        ("ttft_s = 0", ["`keys.a.ttft_s`", "> 0", "it is 0"]),
        ("total_s = 1e9", ["`keys.a.total_s`", "<= 86400"]),
        ("isolated_cache = 1", ["`keys.a.isolated_cache`", "bool", "it is 1"]),
        ("isolated_cash = true", ["`keys.a.isolated_cash`", "`isolated_cache`"]),
    ],
)
def test_a_wrong_key_table_is_refused_by_name_and_shows_no_key(written, text, words):
    own = "" if "key_sha256 =" in text or text == "weight = 2" else f'key_sha256 = "{digest("a")}"\n'
    with pytest.raises(SettingsError) as error:
        load(written(f"[keys.a]\n{own}{text}\n"))
    for word in ["lq.toml", *words]:
        assert word in str(error.value)
    assert SECRET not in str(error.value)
    assert "12345678" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (f'[keys]\nalice = "{SECRET}"', ["keys.alice", "object"]),
        (f'keys = "{SECRET}"', ["keys", "object"]),
        (f'[keys."a b"]\nkey_sha256 = "{digest("a")}"', ["'a b' is no name"]),
        (
            f'[keys.a]\nkey_sha256 = "{digest("x")}"\n[keys.b]\nkey_sha256 = "{digest("x").upper()}"',
            ["keys.b.key_sha256", "digest of keys.a", "a key of its own"],
        ),
        ("[limits]\nttft_s = -1", ["`limits.ttft_s`", "> 0", "it is -1"]),
        ("[limits]\nttfts = 1", ["`limits.ttfts`", "`ttft_s`"]),
        ("[limits]\nweight = 2", ["`limits.weight`"]),
        ('[server]\nhost = "h"\nport = "x"', ["`server.port`", "it is 'x'"]),
    ],
)
def test_a_wrong_file_is_refused_by_name_and_shows_no_key(written, text, words):
    with pytest.raises(SettingsError) as error:
        load(written(text))
    for word in ["lq.toml", *words]:
        assert word in str(error.value)
    assert SECRET not in str(error.value)
    assert digest("x") not in str(error.value)


def test_settings_built_in_code_are_checked_as_those_of_a_file():
    from server.settings import complete

    with pytest.raises(SettingsError, match=r"here: keys\.a\.key_sha256"):
        complete(Settings(keys={"a": Key(key_sha256="x")}), "here")


def test_a_keys_own_limits_hold_over_the_general_ones():
    limits = Limits(max_requests=9, max_running=3, tokens_per_minute=100, ttft_s=5, isolated_cache=True)
    key = Key(key_sha256="", weight=2, priority=1, max_requests=4, total_s=60, tokens_per_minute="unlimited")
    assert policy("a", key, limits) == Policy(
        name="a", weight=2, priority=1, max_requests=4, max_running=3, tokens_per_minute=None,
        ttft_s=5, total_s=60, isolated_cache=True,
    )  # fmt: skip
    assert not policy("a", Key(key_sha256="", isolated_cache=False), limits).isolated_cache


def test_the_general_limits_hold_for_keys_without_a_table_and_for_nobody():
    limits = Limits(total_s=60, max_requests="unlimited")
    for name in ("LQ_API_KEY", ""):
        assert policy(name, None, limits) == Policy(name=name, total_s=60)
    assert policy("", None, Limits()) == Policy()
