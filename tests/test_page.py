"""The page at `/`: in Chromium, with a tiny model, or with answers that the tests make up."""

import contextlib
import json
import random
import re
import shutil
import threading

import pytest
from tiny import fresh_rng, write_tiny_model

from jaxsplit.config import SamplingConfig
from jaxsplit.server.config import ServerConfig
from jaxsplit.server.run import Server
from jaxsplit.server.service import Service

api = pytest.importorskip(
    "playwright.sync_api", reason="playwright is not installed: pip install playwright"
)
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on the path")

api.expect.set_options(timeout=60_000)
ANSWER = "article.assistant"
DONE = "article.assistant:not(.running)"


@pytest.fixture(scope="module")
def serve(tmp_path_factory, load):
    """`serve(**config)`: a server of a tiny model, in a context."""
    path = write_tiny_model(tmp_path_factory.mktemp("page") / "tiny.gguf", context=4096)
    lm = load(path, devices=2, ctx_size=4096, slots=2, cache_tokens=4096)

    @contextlib.contextmanager
    def context(**config):
        service = Service(ServerConfig(port=0, **config), SamplingConfig())
        server = Server(service, lambda: (lm, "tiny.gguf"))
        thread = threading.Thread(target=server.run)
        thread.start()
        try:
            yield server.url
        finally:
            server.stop()
            thread.join()

    return context


@pytest.fixture(scope="module")
def url(serve):
    with serve() as url:
        yield url


@pytest.fixture(scope="module")
def chromium():
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def open_page(chromium, url):
    """`open_page(url, **context)`: the page in a new profile; it must not complain."""
    complaints, contexts = [], []

    def get(url=url, **options):
        contexts.append(chromium.new_context(base_url=url, **options))
        contexts[-1].set_default_timeout(60_000)
        page = contexts[-1].new_page()
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("console", lambda m: complaints.append(m.text) if "Security" in m.text else None)
        page.goto(url)
        return page

    yield get
    for context in contexts:
        context.close()
    assert not complaints


@pytest.fixture
def page(open_page):
    return open_page()


def stream(*deltas, usage=None, timings=None, finish="stop", error=None):
    """Server-sent events of an answer."""
    chunks = [{"choices": [{"index": 0, "delta": d, "finish_reason": None}]} for d in deltas]
    if error is not None:
        chunks.append({"error": {"message": error}})
        return "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks)
    last = {"choices": [{"index": 0, "delta": {}, "finish_reason": finish}]}
    chunks.append(last | ({"timings": timings} if timings else {}))
    if usage:
        chunks.append({"choices": [], "usage": usage})
    return "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + "data: [DONE]\n\n"


def answers(page, *bodies):
    """Makes up the answers; returns the requests for them."""
    requests, left = [], list(bodies)

    def fulfill(route):
        requests.append(route.request.post_data_json)
        body = left.pop(0)
        if isinstance(body, dict):
            route.fulfill(**body)
        else:
            route.fulfill(body=body, content_type="text/event-stream")

    page.route("**/v1/chat/completions", fulfill)
    return requests


def say(page, text):
    page.get_by_label("Message", exact=True).fill(text)
    page.keyboard.press("Enter")


def settings(page, values):
    """Fills fields of the settings, by their labels."""
    page.get_by_role("button", name="Settings").click()
    for label, value in values.items():
        page.get_by_label(label).fill(value)
    page.keyboard.press("Escape")


def answer(page, *deltas, **options):
    """Has an answer shown; returns its element."""
    answers(page, stream(*deltas, **options))
    say(page, "Hello")
    page.locator(DONE).last.wait_for()
    return page.locator(ANSWER).last


# With a model


def test_answers_are_streamed_stopped_and_generated_again(page):
    settings(page, {"Max tokens": "2000"})
    say(page, "Once upon a time")
    content = page.locator(f"{ANSWER} .content")
    api.expect(content).not_to_have_text("")
    first = content.inner_text()
    api.expect(page.locator(ANSWER)).to_have_class(re.compile("running"))
    page.keyboard.press("Escape")
    page.locator(DONE).wait_for()
    api.expect(page.locator(".statistics")).to_contain_text("stopped")
    assert content.inner_text().startswith(first[:5])
    wait_for_idle(page)

    settings(page, {"Max tokens": "20", "Temperature": "0"})
    page.get_by_role("button", name="Regenerate").click()
    statistics = page.locator(f"{DONE} .statistics")
    api.expect(statistics).to_contain_text("token limit reached")
    assert re.search(
        r"[\d.]+ tokens/s · 20 tokens · first token after [\d.]+ s", statistics.inner_text()
    )
    said = content.inner_text()

    # The same tokens again, and what was read before is in the cache.
    page.get_by_role("button", name="Regenerate").click()
    api.expect(page.locator(f"{DONE} .statistics")).to_contain_text(
        re.compile(r"prompt tokens, [1-9]")
    )
    assert content.inner_text() == said

    page.reload()
    api.expect(content).to_have_text(said, use_inner_text=True)
    api.expect(page.locator("#list [aria-current]")).to_have_text("Once upon a time")


def test_answers_go_on_behind_others_and_survive_a_reload(page):
    settings(page, {"Max tokens": "100"})
    say(page, "First")
    page.get_by_role("button", name="New conversation").click()
    settings(page, {"Max tokens": "3"})
    say(page, "Second")
    statistics = page.locator(f"{DONE} .statistics")
    api.expect(statistics).to_contain_text("3 tokens")
    page.locator("#list").get_by_role("button", name="First").click()
    api.expect(statistics).to_contain_text("100 tokens")

    settings(page, {"Max tokens": "4000"})
    say(page, "Third")
    api.expect(page.locator(".running .content")).not_to_have_text("")
    page.reload()
    api.expect(statistics.last).to_contain_text("interrupted")
    api.expect(page.locator(f"{DONE} .content").last).not_to_have_text("")
    wait_for_idle(page)


def wait_for_idle(page):
    """The server has stopped, too."""
    for _ in range(600):
        slots = page.request.get("slots").json()
        if not any(slot["is_processing"] for slot in slots):
            return
        page.wait_for_timeout(100)
    raise AssertionError("the server still generates")


def test_the_panel_shows_the_model_and_its_devices(page):
    page.get_by_role("button", name="Settings").click()
    api.expect(page.locator("#about")).to_contain_text("tiny")
    api.expect(page.locator("#about")).to_contain_text("mesh tensor:2 of cpu")
    api.expect(page.locator(".device")).to_have_count(2)
    assert page.get_by_label("Top k").get_attribute("placeholder") == "40"
    assert page.get_by_label("Seed").get_attribute("placeholder") == "random"


def test_the_browser_asks_for_the_key_and_sends_it(serve, open_page):
    with serve(api_key="secret") as url:
        wrong = open_page(url, http_credentials={"username": "", "password": "other"})
        api.expect(wrong.locator("body")).to_contain_text("the API key is missing or wrong")
        page = open_page(url, http_credentials={"username": "", "password": "secret"})
        settings(page, {"Max tokens": "3"})
        say(page, "Hello")
        api.expect(page.locator(".statistics")).to_contain_text("3 tokens")


# What the server's answers look like


def test_reasoning_is_folded_and_calls_are_code(page):
    call = [{"index": 0, "id": "1", "function": {"name": "weather", "arguments": '{"city":'}}]
    more = [{"index": 0, "function": {"arguments": ' "Paris"}'}}]
    usage = {"completion_tokens": 7, "prompt_tokens": 100}
    shown = answer(
        page,
        {"reasoning_content": "Let me "},
        {"reasoning_content": "*think*"},
        {"content": "Done."},
        {"tool_calls": call},
        {"tool_calls": more},
        usage=usage | {"prompt_tokens_details": {"cached_tokens": 64}},
        timings={"predicted_per_second": 12.345},
    )
    reasoning = shown.locator(".reasoning .markdown")
    api.expect(reasoning).to_be_hidden()
    shown.get_by_text("Reasoning").click()
    api.expect(reasoning).to_have_text("Let me think")
    api.expect(shown.locator(".content")).to_have_text("Done.")
    api.expect(shown.locator(".calls code")).to_have_text('{"city": "Paris"}')
    api.expect(shown.locator(".calls figcaption")).to_contain_text("call of weather")
    statistics = shown.locator(".statistics").inner_text()
    assert re.fullmatch(
        r"12\.3 tokens/s · 7 tokens · first token after [\d.]+ s · 100 prompt tokens, 64 cached",
        statistics,
    )


@pytest.mark.parametrize(
    ("failure", "message"),
    [
        ({"status": 429, "json": {"error": {"message": "too many wait"}}}, "too many wait"),
        ({"status": 502, "body": "<h1>Bad gateway</h1>"}, "The server answers 502"),
        (stream({"content": "Half"}, error="out of memory"), "out of memory"),
        (stream({"content": "Half"}).partition("data: [DONE]")[0], "ended before the answer did"),
    ],
    ids=["refused", "by a proxy", "midway", "cut off"],
)
def test_errors_are_shown_and_the_answer_can_be_retried(page, failure, message):
    requests = answers(page, failure, stream({"content": "Whole"}))
    say(page, "Hello")
    api.expect(page.get_by_role("alert")).to_contain_text(message)
    page.get_by_role("button", name="Retry").click()
    api.expect(page.locator(f"{DONE} .content")).to_have_text("Whole")
    api.expect(page.get_by_role("alert")).to_be_hidden()
    assert requests[0]["messages"] == requests[1]["messages"]


def test_a_server_that_is_gone_is_told(page):
    page.locator("#model", has_text="tiny").wait_for()
    page.route("**/v1/chat/completions", lambda route: route.abort())
    say(page, "Hello")
    api.expect(page.get_by_role("alert")).to_contain_text("is it still running?")


def test_messages_wait_until_the_model_is_loaded(page):
    loading = {"status": 503, "json": {"status": "loading"}}
    page.route("**/health", lambda route: route.fulfill(**loading))
    page.reload()
    status = page.locator("#status")
    api.expect(status).to_have_text("The model is being loaded …")
    requests = answers(page, stream({"content": "Here"}))
    say(page, "Hello")
    api.expect(page.locator(ANSWER)).to_have_class(re.compile("running"))
    assert not requests
    page.unroute("**/health")
    api.expect(page.locator(f"{DONE} .content")).to_have_text("Here")
    api.expect(status).to_have_text("")


# Conversations


def test_requests_have_the_settings_and_the_messages(page):
    requests = answers(page, *[stream({"content": f"Answer {i}"}) for i in range(3)])
    values = {"Temperature": "0.5", "Top p": "0.9", "Min p": "0", "Seed": "7"}
    settings(page, {"System prompt": "Be brief."} | values)
    say(page, "First")
    page.locator(DONE).wait_for()
    say(page, "Second")
    page.locator(DONE).nth(1).wait_for()
    sent = {"temperature": 0.5, "top_p": 0.9, "min_p": 0, "seed": 7}
    for request in requests:
        assert {k: v for k, v in request.items() if k != "messages"} == sent | {
            "stream": True,
            "stream_options": {"include_usage": True},
        }
    assert requests[1]["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "First"},
        {"role": "assistant", "content": "Answer 0"},
        {"role": "user", "content": "Second"},
    ]

    # What is edited replaces all that came after it.
    page.get_by_role("button", name="Edit").first.click()
    page.get_by_label("Edit the message").fill("Other")
    page.keyboard.press("Enter")
    api.expect(page.locator(f"{DONE} .content")).to_have_text("Answer 2")
    assert requests[2]["messages"][1:] == [{"role": "user", "content": "Other"}]
    assert page.locator("article").count() == 2


def test_values_out_of_range_are_not_sent(page):
    requests = answers(page)
    settings(page, {"Top p": "2"})
    say(page, "Hello")
    api.expect(page.get_by_label("Top p")).to_be_focused()
    assert not requests
    api.expect(page.get_by_label("Message", exact=True)).to_have_value("Hello")


def test_deletions_can_be_taken_back(page):
    answers(page, stream({"content": "One"}), stream({"content": "Two"}))
    say(page, "First")
    page.locator(DONE).wait_for()
    say(page, "Second")
    page.locator(DONE).nth(1).wait_for()
    articles = page.locator("article .content")
    everything = ["First", "One", "Second", "Two"]
    undo = page.get_by_role("button", name="Undo")
    for name, left in {
        "Delete": everything[2:],  # of the first question
        "Clear": [],
    }.items():
        scope = page.locator("#messages" if name == "Delete" else "#list")
        scope.get_by_role("button", name=name).first.click()
        api.expect(articles).to_have_text(left)
        api.expect(undo).to_be_focused()
        page.keyboard.press("Enter")
        api.expect(articles).to_have_text(everything)
    page.locator("#list").get_by_role("button", name="Delete").click()
    api.expect(page.locator("#list li")).to_have_count(0)
    undo.click()
    api.expect(articles).to_have_text(everything)
    page.reload()
    api.expect(articles).to_have_text(everything)


def test_conversations_are_named_exported_and_imported(page, open_page, tmp_path):
    answer(page, {"content": "One"}, {"reasoning_content": "Thought"})
    page.get_by_role("button", name="Rename").click()
    page.get_by_label("Title").fill("My title")
    page.keyboard.press("Enter")
    api.expect(page.locator("#list [aria-current]")).to_have_text("My title")
    page.get_by_role("button", name="New conversation").click()
    answer(page, {"content": "Two"})
    with page.expect_download() as download:
        page.get_by_role("button", name="Export").click()
    file = tmp_path / "export.json"
    download.value.save_as(file)

    other = open_page()
    choose = other.locator("input[type=file]")
    for _ in range(2):  # the second time, all are there
        choose.set_input_files(file)
    api.expect(other.locator("#list li")).to_have_text(["Hello", "My title"])
    other.get_by_role("button", name="My title").click()
    api.expect(other.locator("article .content")).to_have_text(["Hello", "One"])

    for text, message in {
        "no JSON": "it is not JSON",
        "[]": "it is no export of this page",
        '{"format": "jaxsplit-conversations", "conversations": [{"id": "x"}]}': "damaged",
    }.items():
        file.write_text(text)
        choose.set_input_files(file)
        api.expect(other.locator("#toast")).to_contain_text(message)


def test_windows_see_each_other_s_conversations(page):
    other = page.context.new_page()
    other.goto(page.url)
    answer(page, {"content": "One"})
    other.locator("#list").get_by_role("button", name="Hello").click()
    api.expect(other.locator("article .content")).to_have_text(["Hello", "One"])
    answer(page, {"content": "Two"})
    api.expect(other.locator("article .content")).to_have_text(["Hello", "One", "Hello", "Two"])


@pytest.mark.parametrize("secure", [True, False])
def test_messages_and_code_are_copied(open_page, secure):
    """Browsers hide the clipboard from pages that come without HTTPS from other machines."""
    page = open_page()
    if not secure:
        page.add_init_script("delete Navigator.prototype.clipboard")
        page.reload()
    code = "a = 1\n\u202eb\u202c = 2"
    text = f"*One*\n\n```\n{code}\n```\n"
    shown = answer(page, {"content": text})
    field = page.get_by_label("Message", exact=True)
    for place, expected in {".code": code, "footer": text}.items():
        shown.locator(place).get_by_role("button", name="Copy").click()
        api.expect(page.locator("#toast")).to_have_text("Copied.")
        field.fill("")
        page.keyboard.press("Control+V")
        api.expect(field).to_have_value(expected)


def test_a_question_without_an_answer_is_sent_again(page):
    requests = answers(page, stream({"content": "One"}), stream({"content": "Two"}))
    say(page, "Hello")
    page.locator(ANSWER).get_by_role("button", name="Delete").click()
    api.expect(page.locator(ANSWER)).to_have_count(0)
    page.get_by_role("button", name="Send again").click()
    api.expect(page.locator(f"{DONE} .content")).to_have_text("Two")
    assert requests[0] == requests[1]


def test_a_full_storage_is_told(page):
    page.evaluate("localStorage.setItem('other', 'x'.repeat(5 * 1024 * 1024 - 100))")
    answer(page, {"content": "One"})
    api.expect(page.locator("#toast")).to_contain_text("has no room")


# Keyboard and screen


def test_the_keyboard_reaches_everything(page):
    requests = answers(page, stream({"content": "One"}), stream({"content": "Two"}))
    text = page.get_by_label("Message", exact=True)
    api.expect(text).to_be_focused()
    page.keyboard.type("Two")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("lines")
    page.keyboard.press("Enter")
    page.locator(DONE).wait_for()
    assert requests[0]["messages"][-1]["content"] == "Two\nlines"
    api.expect(page.locator("#announced")).to_have_text("One")  # once, when it is finished

    page.keyboard.press("Shift+Tab")
    api.expect(page.get_by_role("button", name="Delete").last).to_be_focused()
    page.keyboard.press("Shift+Tab")
    page.keyboard.press("Enter")
    api.expect(page.locator(f"{DONE} .content")).to_have_text("Two")
    api.expect(text).to_be_focused()
    order = ["Settings", "New conversation", "Two", "Rename", "Clear", "Delete"]
    page.locator("header").get_by_role("button", name="Settings").focus()
    for name in order:
        focused = page.locator(":focus").inner_text()
        assert focused == name
        page.keyboard.press("Tab")


@pytest.mark.parametrize("width", [360, 1400])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_is_wider_than_the_screen(open_page, width, scheme):
    page = open_page(viewport={"width": width, "height": 640}, color_scheme=scheme)
    wide = "| a | b | c |\n|---|---|---|\n" + f"| {'word ' * 30} | {'x' * 200} | c |\n"
    shown = answer(
        page, {"content": f"{'x' * 500}\n\n{wide}\n```\n{'y' * 500}\n```\n`{'z' * 300}`"}
    )
    assert page.evaluate("document.documentElement.scrollWidth") == width
    assert page.evaluate("scroller.scrollWidth - scroller.clientWidth") == 0
    assert shown.bounding_box()["width"] <= min(width, 75 * 16)
    page.get_by_role("button", name="Settings").click()
    assert page.locator("#settings").bounding_box()["width"] <= width
    # WCAG's contrast of normal text
    assert page.evaluate(CONTRAST, [".content p", "#keys", ".statistics", "#settings .hint"]) >= 4.5


CONTRAST = """selectors => Math.min(...selectors.map(selector => {
  const luminance = color => {
    const [r, g, b] = color.match(/[\\d.]+/g).map(x => x / 255)
      .map(x => x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const text = luminance(getComputedStyle(document.querySelector(selector)).color);
  const back = luminance(getComputedStyle(document.body).backgroundColor);
  return (Math.max(text, back) + 0.05) / (Math.min(text, back) + 0.05);
}))"""


def test_it_scrolls_along_only_at_the_end(page):
    line = "A line of text.\n\n"
    answer(page, {"content": line * 200})
    left = "scroller.scrollHeight - scroller.clientHeight - scroller.scrollTop"
    assert page.evaluate(left) < 8
    latest = page.get_by_role("button", name="To the latest message")
    api.expect(latest).to_be_hidden()
    page.locator(ANSWER).hover()
    page.mouse.wheel(0, -2000)
    api.expect(latest).to_be_visible()
    latest.click()
    api.expect(latest).to_be_hidden()
    assert page.evaluate(left) < 8


# Markdown

MARKDOWN = {
    "a *b* __c__ ***d*** ~~e~~ 2 * 3 * 4 f_g_h": (
        "<p>a <em>b</em> <strong>c</strong> <strong><em>d</em></strong> <s>e</s> "
        "2 * 3 * 4 f_g_h</p>"
    ),
    "**重要：**请注意": "<p><strong>重要：</strong>请注意</p>",
    "**a *b** c*": "<p><strong>a *b</strong> c*</p>",
    "`a*b*` ``x`y`` `open": "<p><code>a*b*</code> <code>x`y</code> `open</p>",
    "a\nb": "<p>a<br>b</p>",
    r"\*a\* \_ \( x_1 * y_2 * z \)": "<p>*a* _ <code>x_1 * y_2 * z</code></p>",
    "# One\n###### Six\n#none": "<h3>One</h3><h6>Six</h6><p>#none</p>",
    "a\n\n---\n\n***": "<p>a</p><hr><hr>",
    "- a\n- b\n  - c\n\n  d\n* e": (
        "<ul><li><p>a</p></li><li><p>b</p><ul><li><p>c</p></li></ul><p>d</p></li></ul>"
        "<ul><li><p>e</p></li></ul>"
    ),
    "1. a\n  - b\n    - c\n2. d": (
        "<ol><li><p>a</p><ul><li><p>b</p><ul><li><p>c</p></li></ul></li></ul></li>"
        "<li><p>d</p></li></ol>"
    ),
    "3) a\n4) b": '<ol start="3"><li><p>a</p></li><li><p>b</p></li></ol>',
    "In\n1984. a\n- b": "<p>In<br>1984. a</p><ul><li><p>b</p></li></ul>",
    "- [ ] a\n- [x] b": "<ul><li><p>☐ a</p></li><li><p>☑ b</p></li></ul>",
    "> a\n> > b\n\nc": "<blockquote><p>a</p><blockquote><p>b</p></blockquote></blockquote><p>c</p>",
    "```python\nif a < b:\n\n    *c*\n```\nd": (
        "<figure><figcaption><span>python</span><button>Copy</button></figcaption>"
        "<pre><code>if a &lt; b:\n\n    *c*</code></pre></figure><p>d</p>"
    ),
    "- a\n  ~~~\n  b\n   c\n  ~~~": (
        "<ul><li><p>a</p><figure><figcaption><span></span><button>Copy</button></figcaption>"
        "<pre><code>b\n c</code></pre></figure></li></ul>"
    ),
    "| a | b |\n|---|--:|\n| *c* | d\\|e |\n| <br> |\nf": (
        "<div><table><thead><tr><th>a</th><th>b</th></tr></thead><tbody><tr><td><em>c</em></td>"
        "<td>d|e</td></tr><tr><td><br></td></tr></tbody></table></div><p>f</p>"
    ),
    "a | b\n-|-\n`c|d` | e | f": (
        "<div><table><thead><tr><th>a</th><th>b</th></tr></thead><tbody><tr>"
        "<td><code>c|d</code></td><td>e | f</td></tr></tbody></table></div>"
    ),
    "[a *b*](https://x.org/y_(z) 'title') https://x.org/a_b_c. <https://y.org>": (
        '<p><a href="https://x.org/y_(z)">a <em>b</em></a> '
        '<a href="https://x.org/a_b_c">https://x.org/a_b_c</a>. '
        '&lt;<a href="https://y.org/">https://y.org</a>&gt;</p>'
    ),
    "![a](https://x.org/i.png) [1] [b] (c)": (
        '<p><a href="https://x.org/i.png">a</a> [1] [b] (c)</p>'
    ),
    "a\r\n\r\nb": "<p>a</p><p>b</p>",
}

NASTY = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "<iframe src=https://x.org></iframe><style>*{display:none}</style>",
    "[a](javascript:alert(1)) [b](JaVaScRiPt:alert(1)) [c](data:text/html,x) [d](//x.org)",
    "[a](java\tscript:alert(1)) [b](\x01javascript:alert(1)) <javascript:alert(1)>",
    '[a](https://x.org/"onmouseover="alert(1)) https://x.org/"onclick="alert(1)',
    "![a](javascript:alert(1)) ![b](https://x.org/?secret)",
    "[[a](https://x.org)](https://y.org) [https://x.org](https://y.org)",
    "```<script>\n<script>alert(1)</script>",
    "```html\n</code></pre><script>alert(1)</script>\n```",
    "| <script> | b |\n|---|---|\n| <img src=x onerror=alert(1)> | [a](javascript:x) |",
    "# <script>alert(1)</script>\n> <b onclick=x>\n- <svg onload=alert(1)>",
    "&lt;script&gt; &#60;script&#62;",
    "`\u202egnp.exe\u2066` \u202eabc\u202c",
    "<details open ontoggle=alert(1)>",
]

RENDER = """async text => {
  const { MarkdownView } = await import("/page/markdown.js");
  const root = document.createElement("div");
  new MarkdownView(root).update(text);
  return root.innerHTML;
}"""

_TAGS = re.compile(
    "a|bdi|blockquote|br|button|code|div|em|figcaption|figure|h[3-6]|hr|li|ol|p|pre|s|span|strong|"
    "table|tbody|td|th|thead|tr|ul"
)
_ATTRIBUTES = {
    "class",
    "data-code",
    "data-do",
    "dir",
    "href",
    "rel",
    "start",
    "tabindex",
    "target",
    "title",
}


@pytest.fixture(scope="module")
def render(chromium, url):
    """`render(script, argument)`: what a script returns on the page."""
    context = chromium.new_context()
    page = context.new_page()
    page.goto(url)
    yield page.evaluate
    context.close()


@pytest.mark.parametrize("text", MARKDOWN)
def test_markdown_becomes_elements(render, text):
    shown = render(RENDER, text)
    kept = re.sub(r' (?!href|start)[a-z-]+="[^"]*"', "", shown)
    assert kept == MARKDOWN[text]


@pytest.mark.parametrize("text", NASTY)
def test_what_a_model_writes_is_text(render, text):
    found = render(
        """async ([render, text]) => {
          const root = document.createElement("div");
          const { MarkdownView } = await import("/page/markdown.js");
          new MarkdownView(root).update(text);
          const all = [...root.querySelectorAll("*")];
          return {
            tags: all.map(e => e.localName),
            attributes: all.flatMap(e => e.getAttributeNames()),
            links: all.filter(e => e.localName === "a").map(e => [e.href, e.rel, e.target]),
            nested: root.querySelectorAll("a a").length,
            text: root.textContent,
          };
        }""",
        [RENDER, text],
    )
    assert all(map(_TAGS.fullmatch, found["tags"]))
    assert set(found["attributes"]) <= _ATTRIBUTES
    for href, rel, target in found["links"]:
        assert href.startswith("https://")
        assert (rel, target) == ("noopener noreferrer", "_blank")
    assert not found["nested"]
    for word in re.findall(r"<[a-z]+|javascript:\w+", text.replace("```<script>", "")):
        assert word in found["text"]


def test_text_that_grows_looks_as_if_it_came_at_once(render):
    texts = [*MARKDOWN, *NASTY]
    rng = random.Random(int(fresh_rng().integers(2**32)))
    rng.shuffle(texts)
    texts += ["\n".join(texts), "\n\n".join(texts)]
    cuts = [sorted(rng.sample(range(len(t)), min(len(t), 400))) for t in texts]
    wrong = render(
        """async ([texts, cuts]) => {
          const { MarkdownView } = await import("/page/markdown.js");
          return texts.filter((text, i) => {
            const [whole, grown] = [0, 0].map(() => document.createElement("div"));
            new MarkdownView(whole).update(text);
            const view = new MarkdownView(grown);
            for (const cut of [...cuts[i], text.length]) view.update(text.slice(0, cut));
            return !whole.isEqualNode(grown);
          });
        }""",
        [texts, cuts],
    )
    assert wrong == []


@pytest.mark.parametrize(
    "unit",
    [*"[]*_`~(!<\\|#->$ \n", "**a", "*a_b", "[a](", "![", "](https://x.org)", "`a", "``a`", "| a "]
    + [
        "> ",
        "- ",
        "  - a\n",
        "1. ",
        "```\n",
        "a\n",
        "|-",
        "https://x.org/(",
        "\\(",
        "(a",
        "|`a",
        '[a](b "',
    ],
)
def test_repetition_takes_linear_time(render, unit):
    """80000 characters that a broken model may repeat: quadratic time is minutes."""
    seconds = render(
        """async text => {
          const { MarkdownView } = await import("/page/markdown.js");
          const start = performance.now();
          for (const sent of [text, text + "x", "| a |\\n|---|\\n" + text]) {
            new MarkdownView(document.createElement("div")).update(sent);
          }
          return (performance.now() - start) / 1000;
        }""",
        unit * (80_000 // len(unit)),
    )
    assert seconds < 5


@pytest.mark.parametrize(
    "text",
    [
        "> " * 3000 + "a",
        "- " * 3000 + "a",
        "\n".join("  " * i + "- a" for i in range(200)),
        "*a _b " * 3000 + "c_ d* " * 3000,
        "[" * 3000 + "](https://x.org)" * 3000,
    ],
    ids=["quotes", "lists", "indented lists", "emphasis", "links"],
)
def test_nesting_is_bounded(render, text):
    """Layout is recursive."""
    depth = render(
        """async text => {
          const { MarkdownView } = await import("/page/markdown.js");
          const depth = e => 1 + Math.max(0, ...[...e.children].map(depth));
          const root = document.createElement("div");
          new MarkdownView(root).update(text);
          return depth(root);
        }""",
        text,
    )
    assert depth < 100


def test_long_answers_are_drawn_in_linear_time(render):
    """20000 tokens, drawn after each fourth of them."""
    seconds = render(
        """async () => {
          const { MarkdownView } = await import("/page/markdown.js");
          const root = document.createElement("div");
          const view = new MarkdownView(root);
          let text = "";
          const start = performance.now();
          for (let i = 0; i < 5000; i++) {
            text += i % 8 ? "some *more* words " : ".\\n\\n- `next`\\n\\n";
            view.update(text);
          }
          return (performance.now() - start) / 1000;
        }""",
    )
    assert seconds < 5


def test_the_policy_forbids_inline_scripts_and_html(open_page, url):
    page = open_page()
    done = page.evaluate("""() => {
      const script = document.createElement("script");
      let thrown = 0;
      for (const act of [
        () => (document.body.innerHTML = "<b>x</b>"),
        () => script.text = "window.ran = true",
        () => script.src = "https://x.org/x.js",
      ]) try { act() } catch { thrown++ }
      return [thrown, window.ran];
    }""")
    assert done == [3, None]
    header = page.request.get(url).headers["content-security-policy"]
    assert "unsafe" not in header
    assert page.request.get(f"{url}/page/other.js").status == 404


def test_the_page_is_small():
    from importlib.resources import files

    folder = files("jaxsplit.server").joinpath("static")
    assert sum(len(file.read_bytes()) for file in folder.iterdir()) < 60_000
