"""lq.toml, keys and hosts: what is read, what is refused."""

import re
from pathlib import Path

import pytest

from server.auth import Hosts, Keys, read_keys
from server.errors import HostNotAllowed, Unauthorized
from server.key_settings import Limits
from server.model_settings import seconds
from server.settings import DEFAULT_MODEL, HTTP, Adapter, Model, Settings, SettingsError, load, with_models

EXAMPLE = Path(__file__).parents[2] / "examples" / "lq.toml"


@pytest.fixture(autouse=True)
def _no_key(monkeypatch):
    monkeypatch.delenv("LQ_API_KEY", raising=False)


def test_the_example_loads_and_shows_the_defaults():
    settings = load(EXAMPLE)
    assert settings.server == HTTP()
    assert settings.models["smollm2-135m-instruct"] == Model(model="smollm2-135m-instruct")
    assert settings.assistants["terse"].temperature == 0.0


def test_what_the_example_shows_in_comments_is_valid(written):
    before, limits, after = EXAMPLE.read_text().partition("[limits]\n")
    text = before + limits + re.sub(r"^# (?=\w+ = |\[keys)", "", after, flags=re.MULTILINE)
    settings = load(written(text))
    assert settings.keys["chat"].weight == 3
    assert settings.keys["chat"].max_requests == "unlimited"
    assert settings.keys["nightly-batch"].tokens_per_minute == 20_000
    assert settings.limits.max_running == 8
    assert load(EXAMPLE).limits == Limits()


def test_paths_are_relative_to_the_file_and_store_names_stay(written, tmp_path):
    (tmp_path / "keys").write_text("k")
    text = (
        '[server]\napi_key_file = "keys"\n[models.a]\nmodel = "./m.gguf"\n'
        'lora = ["stored", {path="x/y", scale=0.5}]\nadapters = {legal = "x/z"}'
        '\n[models.b]\nmodel = "stored"\n[assistants.c]\nmodel = "a"\nprompt = "p/q.prompt"\n'
    )
    settings = load(written(text))
    assert settings.server.api_key_file == str(tmp_path / "keys")
    assert settings.models["a"].model == str(tmp_path / "m.gguf")
    assert settings.models["a"].lora == (
        Adapter(path="stored"),
        Adapter(path=str(tmp_path / "x/y"), scale=0.5),
    )
    assert settings.models["a"].adapters == {"legal": Adapter(path=str(tmp_path / "x/z"))}
    assert settings.models["b"].model == "stored"
    assert settings.assistants["c"].prompt == str(tmp_path / "p/q.prompt")


def test_an_assistant_may_name_a_model_of_the_store(written):
    assert load(written('[assistants.a]\nmodel = "stored"')).models == {"stored": Model()}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[servr]", ["`servr`", "`server`"]),
        ("[server]\nhots = 1", ["`server.hots`", "`host`"]),
        ("[server]\nport = 70000", ["`server.port`", "65535"]),
        ("[models.a]\nn_ctc = 1", ["`models.a.n_ctc`", "`n_ctx`"]),
        ('[models.a]\nn_ctx = "x"', ["`models.a.n_ctx`", "int", "str"]),
        ('[models.a]\nkv_type_v = "f8"', ["`models.a.kv_type_v`", "'f8'"]),
        (
            '[models.a]\nkeep_alive = "ten minutes"',
            ["`models.a`", "keep_alive", "'ten minutes' is no duration"],
        ),
        ("[models.a]\nkeep_alive = -1", ["`models.a`", "keep_alive", "'-1' is no duration"]),
        ('[models.a]\nadapters = {"a/b" = "x"}', ["`models.a`", "'a/b' is no name"]),
        ('[models.a]\nadapters = ["x"]', ["`models.a.adapters`", "object"]),
        (
            '[assistants.b]\nmodel = "a"\nadapter_scale = 2',
            ["assistants.b", "`adapter_scale` needs an `adapter`"],
        ),
        *(
            (
                f'[assistants.b]\nmodel = "a"\nadapter = "x"\nadapter_scale = {scale}',
                ["assistants.b.adapter_scale"],
            )
            for scale in ("100.5", "-101", "nan", "inf", "true", '"1"')
        ),
        (
            '[models.a]\nadapters = {x = "x"}\n[assistants.b]\nmodel = "a"\nadapter = "y"',
            ["assistants.b", "'a' has no adapter 'y'", "x"],
        ),
        ("[models.a]\nn_ctx = 100\nkv_cells = 99", ["`models.a`", "kv_cells is 99", "100 of n_ctx"]),
        ("[server]\nmemory_budget_mb = 0", ["`server.memory_budget_mb`", "0"]),
        ('[models.a]\nlora = [{pth = "x"}]', ["models.a.lora[0]", "pth"]),
        ('[assistants.a]\nmodel = "m"\ntemprature = 1.0', ["`assistants.a.temprature`", "`temperature`"]),
        ('[assistants.a]\nmodel = "m"\ntemperature = 3.0', ["`assistants.a.temperature`", "2.0"]),
        ('[assistants.a]\nprompt = "p"', ["assistants.a", "`model`"]),
        ('[models.a]\n[assistants.a]\nmodel = "a"', ["'a' is a model and an assistant"]),
        ('[models."a/b"]', ["'a/b' is no name"]),
        ("models = 3", ["models"]),
        ("[server", ["not TOML"]),
    ],
)
def test_a_wrong_file_is_refused_by_name(written, text, words):
    with pytest.raises(SettingsError) as error:
        load(written(text))
    for word in ["lq.toml", *words]:
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("forever", None),
        ("0", 0),
        (0, 0),
        (90, 90),
        ("90s", 90),
        ("10", 10),
        ("10m", 600),
        ("1h30m", 5400),
        ("2h5s", 7205),
    ],
)
def test_durations_are_read_as_people_write_them(text, expected):
    assert seconds(text) == expected


@pytest.mark.parametrize(
    "text", ["", "m", "1m1h", "1.5h", "ten", "-5s", "5 m", "1e3", "٣m", "1" * 5000 + "h"]
)
def test_what_is_no_duration_is_refused(text):
    with pytest.raises(ValueError, match=r"no duration|longer than a year"):
        seconds(text)


def test_a_missing_file_is_said_to_be_missing(tmp_path):
    with pytest.raises(SettingsError, match="no such configuration file"):
        load(tmp_path / "nope.toml")


def test_the_command_line_adds_models_and_replaces_what_it_gives():
    settings = with_models(Settings(), {}, host=None, port=9)
    assert settings.models == {DEFAULT_MODEL: Model()}
    assert (settings.server.host, settings.server.port) == ("127.0.0.1", 9)
    assert list(with_models(Settings(), {"m": Model(model="x")}).models) == ["m"]


@pytest.mark.parametrize("given", [{"memory_budget_mb": float("inf")}, {"gpu_memory_budget_mb": -1.0}])
def test_the_command_line_is_checked_as_the_file_is(given):
    (name, value), *_ = given.items()
    with pytest.raises(
        SettingsError, match=rf"^command line: --{name.replace('_', '-')}: .*; it is {value}$"
    ):
        with_models(Settings(), {}, **given)


def test_a_model_of_the_file_keeps_its_options_when_the_command_line_names_it(written, tmp_path):
    settings = load(
        written(
            '[models.a]\nn_ctx = 99\nlora = ["one"]\n[models.b]\nmodel = "./m.gguf"\nn_parallel = 2\n'
            '[assistants.c]\nmodel = "a"\n'
        )
    )
    given = {"a": Model(model="a", lora=(Adapter(path="two"),)), "d": Model(model="d")}
    models = with_models(settings, given).models
    assert models["a"] == Model(n_ctx=99, lora=(Adapter(path="one"), Adapter(path="two")))
    assert models["b"] == settings.models["b"]
    assert models["d"] == Model(model="d")
    same = with_models(settings, {"b": Model(model=str(tmp_path / "m.gguf"))}).models["b"]
    assert same.n_parallel == 2
    with pytest.raises(SettingsError, match=r"'b' means .*m\.gguf in the configuration file and /x/b\.gguf"):
        with_models(settings, {"b": Model(model="/x/b.gguf")})


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.org"])
def test_an_address_that_others_reach_needs_a_key(host, monkeypatch):
    settings = Settings(server=HTTP(host=host))
    with pytest.raises(SettingsError, match="LQ_API_KEY"):
        read_keys(settings)
    monkeypatch.setenv("LQ_API_KEY", "long enough")
    assert read_keys(settings).required


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2", "::1", "localhost"])
def test_loopback_needs_none(host):
    assert not read_keys(Settings(server=HTTP(host=host))).required


def test_key_files_hold_one_key_a_line(tmp_path):
    path = tmp_path / "keys"
    settings = Settings(server=HTTP(api_key_file=str(path)))
    with pytest.raises(SettingsError, match="No such file"):
        read_keys(settings)
    path.write_text("# nothing\n\n")
    with pytest.raises(SettingsError, match="holds no key"):
        read_keys(settings)
    path.write_text("short\n")
    with pytest.raises(SettingsError, match="8 or more"):
        read_keys(settings)
    for key in ("schlüssel-1234", "a\tkey-with-tab"):
        path.write_text(key)
        with pytest.raises(SettingsError, match="ASCII") as error:
            read_keys(settings)
        assert key not in str(error.value)
    path.write_text("# mine\nfirst-key-1\n second-key-2 \n")
    keys = read_keys(settings)
    keys.check("Bearer first-key-1")
    keys.check("bearer second-key-2")
    with pytest.raises(Unauthorized):
        keys.check("Bearer first-key-")
    Keys(()).check(None)


def test_hosts_are_open_where_a_key_guards_and_closed_on_loopback():
    Hosts(Settings(server=HTTP(host="0.0.0.0"))).check("anything.example")
    hosts = Hosts(Settings(server=HTTP(allowed_hosts=("LQ.example",))))
    hosts.check("lq.example:8000")
    own = Hosts(Settings(server=HTTP(host="fd00::5", allowed_hosts=("FD00:0::6",))))
    own.check("[fd00::5]:8000")
    own.check("[fd00::6]")
    for bad in (None, "", "evil.example", "127.0.0.1.evil.example", "[::2]:80"):
        with pytest.raises(HostNotAllowed):
            hosts.check(bad)
