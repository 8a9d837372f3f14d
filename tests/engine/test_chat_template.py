"""Chat templates: what real ones need, and what hostile ones cannot do."""

import contextlib

import pytest

from engine import sandbox
from engine.chat import render_chat
from engine.request import InvalidRequest

CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content']"
    " + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
HI = [{"role": "user", "content": "hi"}]


def render(template: str, messages=HI, **options) -> str:
    return render_chat(template, messages, **TOKENS, **options)


def test_chatml_ends_where_the_answer_begins():
    assert render(CHATML) == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert render(CHATML, add_generation_prompt=False) == "<|im_start|>user\nhi<|im_end|>\n"


def test_blocks_leave_no_whitespace_of_their_own():
    assert (
        render("{% for m in messages %}\n  {% if true %}\n{{ m.content }}\n  {% endif %}\n{% endfor %}")
        == "hi\n"
    )


def test_tojson_keeps_unicode_and_html_characters():
    messages = [{"role": "user", "content": "<b>한글</b>"}]
    assert render("{{ messages[0] | tojson }}", messages) == '{"role": "user", "content": "<b>한글</b>"}'
    assert render("{{ [1] | tojson(indent=2) }}") == "[\n  1\n]"


def test_loop_controls_namespaces_macros_and_generation_marks_work():
    assert render("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}") == "01"
    counted = (
        "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}"
    )
    assert render(counted) == "1"
    assert render("{% macro twice(x) %}{{ x ~ x }}{% endmacro %}{{ twice('a') }}") == "aa"
    assert render("{% generation %}{{ messages[0].content }}{% endgeneration %}") == "hi"
    assert render(
        "{{ 'a-b'.split('-') | join('+') }}{{ 'aXa'.replace('X', 'b') }}{{ '-'.join(['x', 'y']) }}"
    ) == ("a+babax-y")


def test_loops_know_their_first_last_and_length():
    template = "{% for m in messages %}{{ loop.index }}/{{ loop.length }}{{ '!' if loop.last }}{% endfor %}"
    assert render(template, HI * 2) == "1/22/2!"


def test_lists_and_numbers_of_ordinary_size_are_computed():
    assert render("{{ 1000000 * 50000000 }}") == "50000000000000"
    assert (
        render("{{ [1, 2, 3]|batch(2, 0)|list }}{{ [1, 2, 3]|slice(2)|list }}")
        == "[[1, 2], [3, 0]][[1, 2], [3]]"
    )
    assert render("{{ 1.255|round(1) }}{{ 1.5|round(0, 'ceil')|int }}") == "1.32"
    assert render("{% set a, b = 'x', messages %}{{ a }}{{ b|length }}{{ [a] + b == b + [a] }}") == "x1False"
    gathered = (
        "{% set ns = namespace(all=[]) %}{% for m in messages %}{% set ns.all = ns.all + [m] %}{% endfor %}"
        "{{ ns.all|map(attribute='content')|join }}"
    )
    assert render(gathered, [{"role": "user", "content": "words " * 200}] * 2000) == "words " * 400_000


def test_tools_and_other_variables_reach_the_template():
    template = "{{ tools[0].name }}{{ enable_thinking }}"
    assert render(template, tools=[{"name": "f"}], variables={"enable_thinking": False}) == "fFalse"


def test_variables_do_not_replace_what_every_template_gets():
    taken = {"messages": [], "bos_token": "no", "eos_token": "no", "add_generation_prompt": False, "tools": 1}
    template = "{{ messages[0].content }}{{ bos_token }}{{ eos_token }}{{ add_generation_prompt }}{{ tools }}"
    assert render(template, variables=taken) == "hi<s></s>TrueNone"


def test_what_the_template_raises_reaches_the_caller_with_its_words():
    with pytest.raises(InvalidRequest, match="roles must alternate") as caught:
        render("{{ raise_exception('roles must alternate') }}")
    assert caught.value.field == "messages"


def test_messages_that_the_template_cannot_print_are_named():
    with pytest.raises(InvalidRequest, match="fails on these messages") as caught:
        render("{{ messages[0].content + 1 }}")
    assert caught.value.field == "messages"


def test_a_template_that_is_not_jinja_is_refused():
    with pytest.raises(InvalidRequest, match="not valid Jinja") as caught:
        render("{% for x in %}")
    assert caught.value.field == "chat_template"
    with pytest.raises(InvalidRequest, match="at most"):
        render(" " * 300_000)


def test_the_messages_cannot_be_changed_by_the_template():
    messages = [{"role": "user", "content": "hi"}]
    with pytest.raises(InvalidRequest):
        render("{{ messages.append(1) }}", messages)
    assert messages == HI


@pytest.mark.parametrize(
    "escape",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.__class__.__init__.__globals__ }}",
        "{{ (messages|attr('__class__')).__mro__[1].__subclasses__() }}",
        "{{ raise_exception.__globals__ }}",
        "{{ cycler.__init__.__globals__ }}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}",
        "{{ '{0.__class__}'.format(messages) }}",
        "{{ '{a.__class__}'.format_map({'a': messages}) }}",
        "{{ self.__init__.__globals__ }}",
    ],
)
def test_no_way_out_of_the_sandbox(escape):
    with contextlib.suppress(InvalidRequest):
        assert render(escape) == ""  # an undefined value prints nothing


@pytest.mark.parametrize(
    "bomb",
    [
        "{{ 'a' * 10 ** 12 }}",
        "{{ 'a' * 100000000 }}",
        "{{ ['a'] * 100000000 }}",
        "{% set x = 'a' * 1000000 %}" + "{% set x = x ~ x %}" * 20 + "{{ x }}",
        "{% set x = 'a' * 1000000 %}" + "{% set x = x + x %}" * 20 + "{{ x }}",
        "{% set x = 'aaaaaaaaaa' %}" + "{% set x = x.replace('a', 'aaaaaaaaaa') %}" * 12 + "{{ x }}",
        "{% set x = 'aaaaaaaaaa' %}" + "{% set x = x | replace('a', 'aaaaaaaaaa') %}" * 12 + "{{ x }}",
        "{% set x = 'a' * 1000000 %}" + "{% set x %}{{ x }}{{ x }}{% endset %}" * 20 + "{{ x }}",
        "{% set x = 'a' * 1000000 %}{{ x.join(range(10000) | map('string')) }}",
        "{{ 'a'.ljust(100000000000) }}{{ 'a'.center(100000000000) }}",
        "{{ '%99999999999d' % 1 }}",
        "{{ 'a' | center(100000000000) }}",
        "{{ lipsum(n=100000000) }}",
        "{% macro m(x) %}{{ m(x) }}{% endmacro %}{{ m(1) }}",
        "{{ range(100000000000) | list }}",
        "{{ []|slice(3000000)|list|length }}",
        "{{ [1]|batch(20000000, 0)|list|length }}",
        "{{ 1.5|round(1000000000, 'ceil') }}",
        "{{ 5|round(-1000000000) }}",
        "{{ ('f' * 1000000)|int(0, 16) }}",
        "{{ messages|tojson(indent=1, separators=('a' * 9000000, 'b' * 9000000)) }}",
        "{% set ns = namespace(a=range(50000)|list) %}"
        "{% for _ in range(500) %}{% set ns.a = [ns.a] %}{% endfor %}{{ ns.a|tojson(indent=16) }}",
        *(
            "{% set ns = namespace(a=[]) %}{% macro keep() %}{% set ns.a = varargs %}{% endmacro %}"
            "{% for _ in range(40) %}" + grow + "{% endfor %}{{ ns.a }}"
            for grow in (
                "{% set ns.a = [ns.a, ns.a] %}",
                "{% set ns.a = (ns.a, ns.a) %}",
                "{% set ns.a = {1: ns.a, 2: ns.a} %}",
                "{% set ns.a = dict(x=ns.a, y=ns.a) %}",
                "{% set ns.a = dict(x=ns.a, y=ns.a).values() %}",
                "{% set ns.a = [ns.a] * 2 %}",
                "{% set ns.a = [ns.a] + [ns.a] %}",
                "{% set ns.a = [ns.a]|batch(2, ns.a)|list %}",
                "{% set ns.a = [0, 0]|map('default', ns.a, true)|list %}",
                "{% set ns.a = [ns, ns]|map(attribute='a')|list %}",
                "{{ keep(ns.a, ns.a) }}",
            )
        ),
    ],
)
def test_no_text_can_be_blown_up(bomb):
    with pytest.raises(InvalidRequest):
        render(bomb)


@pytest.mark.parametrize(
    "loop",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% for a in range(99999) %}{% set x = range(99999) | sort %}{% endfor %}",
        "{% macro m() %}{% for a in range(99999) %}{{ m }}{% endfor %}{% endmacro %}"
        "{% for a in range(99999) %}{{ m() }}{% endfor %}",
    ],
)
def test_endless_work_is_cut_off(loop, monkeypatch):
    monkeypatch.setattr(sandbox, "MAX_RENDER_S", 0.2)
    with pytest.raises(InvalidRequest, match="takes more than"):
        render(loop)
