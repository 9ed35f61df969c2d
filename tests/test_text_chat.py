"""Chat templates."""

import datetime
import subprocess
import sys

import pytest

from jaxsplit.errors import JaxsplitError
from jaxsplit.text import ChatTemplate

# The template of SmolLM2-135M-Instruct.
CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
    "<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + "
    "'<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\n' }}{% endif %}"
)
HELLO = [{"role": "user", "content": "Hello"}]


def test_chatml():
    chat = ChatTemplate.from_metadata({"tokenizer.chat_template": CHATML})
    expected = (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
        "<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n"
    )
    assert chat.render(HELLO) == expected + "<|im_start|>assistant\n"
    assert chat.render(HELLO, add_generation_prompt=False) == expected
    conversation = [
        {"role": "system", "content": "Be brief."},
        *HELLO,
        {"role": "assistant", "content": "Hi."},
        {"role": "user", "content": "Bye"},
    ]
    assert chat.render(conversation) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n"
        "<|im_start|>assistant\nHi.<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_token_texts():
    chat = ChatTemplate.from_metadata(
        {
            "tokenizer.chat_template": "{{ bos_token }}{{ messages[0].content }}{{ eos_token }}",
            "tokenizer.ggml.tokens": ["<s>", "</s>"],
            "tokenizer.ggml.bos_token_id": 0,
            "tokenizer.ggml.eos_token_id": 1,
        }
    )
    assert chat.render(HELLO) == "<s>Hello</s>"
    assert (chat.bos_token, chat.eos_token) == ("<s>", "</s>")


def test_token_texts_that_the_file_does_not_name():
    """The kind of tokenizer says which they are; an id outside the vocabulary is none."""
    metadata = {
        "tokenizer.chat_template": "{{ bos_token }}",
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": ["<unk>", "<s>", "</s>"],
    }
    chat = ChatTemplate.from_metadata(metadata)
    assert (chat.bos_token, chat.eos_token) == ("<s>", "</s>")
    chat = ChatTemplate.from_metadata(metadata | {"tokenizer.ggml.bos_token_id": 2**32 - 1})
    assert (chat.bos_token, chat.eos_token) == ("", "</s>")


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        # Blocks leave no lines and no indentation behind.
        ("{% if true %}\n  {% set x = 1 %}\nx={{ x }}\n{% endif %}\n", "x=1\n"),
        ("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "01"),
        ("{{ {'ä': '<'} | tojson }}", '{"ä": "<"}'),
        ("{{ [1] | tojson(indent=1) }}", "[\n 1\n]"),
        ("{{ strftime_now('%Y') }}", str(datetime.date.today().year)),
        ("{% generation %}{{ messages[0].content }}{% endgeneration %}", "Hello"),
        ("{% if tools is defined and tools is not none %}tools{% endif %}", ""),
        ("{{ enable_thinking | default(true) }}", "True"),
    ],
)
def test_template_environment(template, expected):
    assert ChatTemplate(template).render(HELLO) == expected


def test_more_variables():
    assert ChatTemplate("{{ enable_thinking }}").render(HELLO, enable_thinking=False) == "False"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('roles must\n alternate') }}", "roles must alternate"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "append"),
        ("{{ messages.__class__.__base__.__subclasses__() }}", "unsafe"),
        ("{{ messages[0].update(role='system') }}", "update"),
        ("{{ 1 + messages }}", "fails on these messages"),
        ("{{ missing.name.other }}", "missing"),
        ("{{ range(10 ** 9) }}", "Range too big"),
    ],
)
def test_refused(template, message):
    with pytest.raises(JaxsplitError, match=message) as error:
        ChatTemplate(template).render(HELLO)
    assert "\n" not in str(error.value)


def test_invalid_template():
    with pytest.raises(JaxsplitError, match="is not valid: .*plain prompt"):
        ChatTemplate("{% if %}")


@pytest.mark.parametrize(
    "template",
    [
        "{% for i in x %}" * 30 + "{% endfor %}" * 30,  # Python allows 20 nested blocks.
        "{{ " + "(" * 5000 + ")" * 5000 + " }}",
    ],
)
def test_templates_that_python_refuses(template):
    with pytest.raises(JaxsplitError, match="chat template .*plain prompt") as error:
        ChatTemplate(template).render(HELLO)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "messages", ["Hello", HELLO[0], ["Hello"], [None], [HELLO], None, 7, [{"role": "user"}, 3]]
)
def test_messages_of_another_form(messages):
    with pytest.raises(JaxsplitError, match='messages is .*must be a list such as .*"role"'):
        ChatTemplate(CHATML).render(messages)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("tokenizer.chat_template", ["a"]),
        ("tokenizer.chat_template", 3),
        ("tokenizer.ggml.bos_token_id", [1]),
        ("tokenizer.ggml.eos_token_id", "</s>"),
        ("tokenizer.ggml.eos_token_id", 1.0),
        ("tokenizer.ggml.tokens", "abc"),
        ("tokenizer.ggml.tokens", [1]),
        ("tokenizer.ggml.model", ["llama"]),
    ],
)
def test_metadata_of_another_type(key, value):
    metadata = {"tokenizer.chat_template": CHATML, "tokenizer.ggml.tokens": ["<s>", "</s>"]}
    with pytest.raises(JaxsplitError, match=f"{key}.* must be a") as error:
        ChatTemplate.from_metadata(metadata | {key: value})
    assert "\n" not in str(error.value)


def test_no_template():
    with pytest.raises(JaxsplitError, match="no chat template.*plain prompt"):
        ChatTemplate.from_metadata({})


def test_import_is_light():
    program = (
        "import sys, jaxsplit.text; "
        "print([m for m in ('jinja2', 'tokenizers') if m in sys.modules])"
    )
    output = subprocess.check_output([sys.executable, "-c", program], text=True)
    assert output.strip() == "[]"
