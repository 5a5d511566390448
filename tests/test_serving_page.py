"""The chat page in headless Chromium, against a server of the embedded preset.

Without Chromium (Debian: `apt-get install chromium`) these tests are skipped.
"""

import http.client
import json
import os
import re
import shutil
import time

import pytest
from http_server import PATIENCE, running

from keras_gemma2 import Gemma2CausalLM
from keras_gemma2.serving.guard import Limits
from keras_gemma2.serving.page import FOLDER, NAMES

pytestmark = pytest.mark.backend_free
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_browser = pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")
BROWSER_PATIENCE = 60_000  # milliseconds
HTML = "<script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'> & <b>bold</b>"
# What a browser does by itself, updates above all, is no part of the page.
QUIET = ["--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update"]


@pytest.fixture(scope="module")
def lm():
    return Gemma2CausalLM.from_preset("gemma2_mini_en", dtype="float32")


@pytest.fixture(scope="module")
def server(lm):
    with running(lm, limits=Limits(hosts=frozenset(("127.0.0.1",)))) as found:
        yield found


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=QUIET, chromium_sandbox=os.geteuid() != 0)
        yield browser
        browser.close()


@pytest.fixture
def page(browser, server):
    """The page, newly opened in a browser that has never been there; it may load and complain of nothing."""
    address = "http://{}:{}/".format(*server[0])
    context = browser.new_context(viewport={"width": 1100, "height": 750}, permissions=["clipboard-read", "clipboard-write"])
    context.set_default_timeout(BROWSER_PATIENCE)
    page = context.new_page()
    asked, said = [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.goto(address)
    page.wait_for_selector("#model option", state="attached")
    yield page
    assert all(url.startswith((address, "data:")) for url in asked)
    wanted = "Failed to load resource|cannot be (read|kept)"  # by some tests
    assert [text for text in said if not re.search(wanted, text)] == []
    context.close()


def send(page, text):
    page.fill("#input", text)
    page.press("#input", "Enter")


def until(page, expression):
    """Waits until an expression of JavaScript is true; the browser's own way would have to be let through the page's policy."""
    deadline = time.monotonic() + BROWSER_PATIENCE / 1000
    while not page.evaluate(expression):
        assert time.monotonic() < deadline, expression
        page.wait_for_timeout(10)


def answered(page, count=1):
    """The texts of so many answers, the last of which has ended."""
    until(page, f"document.querySelectorAll('.assistant').length === {count} && document.getElementById('stop').hidden")
    return page.locator(".assistant .text").all_inner_texts()


def faked(page, *events):
    """Lets the server's answers be these."""
    body = "".join(f"data: {json.dumps(event)}\n\n" for event in events) + "data: [DONE]\n\n"
    page.route("**/v1/chat/completions", lambda route: route.fulfill(body=body, content_type="text/event-stream"))


def delta(text):
    return {"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": None}]}


# What it shows ----------------------------------------------------------------------------------------------------------


@needs_browser
def test_a_real_answer_streams_in(page, lm):
    """Bit by bit, and it is the model's; the settings are what the server is asked for."""
    page.fill("#system", "Be brief.")
    page.locator("#temperature").fill("0")
    page.fill("#length", "40")
    page.press("#length", "Tab")
    lengths = page.evaluate_handle(
        """() => { const seen = []; new MutationObserver(() => {
               const text = document.querySelector('.running .text');
               if (text && seen.at(-1) !== text.textContent.length) seen.push(text.textContent.length);
           }).observe(document.getElementById('messages'), {subtree: true, childList: true, characterData: true}); return seen; }"""
    )
    with page.expect_request("**/v1/chat/completions") as asked:
        send(page, "Who is Ahab?")
    body = asked.value.post_data_json
    assert (body["temperature"], body["max_tokens"], body["stream"], body["model"]) == (0, 40, True, "mini")
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who is Ahab?"}]
    assert body["messages"] == messages
    assert answered(page) == [lm.chat(messages, sampler="greedy", max_new_tokens=40)]
    assert len(lengths.json_value()) > 5
    send(page, "And then?")
    first, second = answered(page, 2)
    messages += [{"role": "assistant", "content": first}, {"role": "user", "content": "And then?"}]
    assert second == lm.chat(messages, sampler="greedy", max_new_tokens=40)


@needs_browser
def test_stop_stops(page, server):
    """In the page and in the engine; by the button and by Escape."""
    for index, stop in enumerate((lambda: page.click("#stop"), lambda: page.keyboard.press("Escape"))):
        send(page, "Tell me a long story.")
        until(page, "document.querySelector('.running .text')?.textContent.length > 0")
        stop()
        before = answered(page, index + 1)[-1]
        deadline = time.monotonic() + PATIENCE
        while server[1].running and time.monotonic() < deadline:
            time.sleep(0.01)
        assert server[1].running == 0
        page.wait_for_timeout(200)
        assert page.locator(".assistant .text").all_inner_texts()[-1] == before
        assert page.locator(".assistant .tools").last.inner_text().endswith("Stopped.")
    assert page.is_visible("#send")


@needs_browser
def test_regenerate_and_copy(page):
    faked(page, delta("first"))
    send(page, "A question")
    assert answered(page) == ["first"]
    page.unroute("**/v1/chat/completions")
    faked(page, delta("sec"), delta("ond"))
    with page.expect_request("**/v1/chat/completions") as asked:
        page.click("text=Regenerate")
    assert asked.value.post_data_json["messages"] == [{"role": "user", "content": "A question"}]
    until(page, "document.querySelector('.assistant .text').textContent === 'second'")
    assert answered(page) == ["second"]
    page.locator(".assistant >> text=Copy").click()
    page.wait_for_selector("text=Copied")
    assert page.evaluate("navigator.clipboard.readText()") == "second"


@needs_browser
def test_reload_keeps(page):
    """Conversations, the one shown, its system text, and the settings."""
    faked(page, delta("kept"))
    page.fill("#system", "A system text")
    send(page, "First conversation")
    answered(page)
    page.click("#new")
    send(page, "Second conversation")
    answered(page)
    page.locator("#temperature").fill("0.3")
    page.click("#theme")
    page.reload()
    assert page.locator("#conversations .open").all_inner_texts() == ["Second conversation", "First conversation"]
    assert page.locator(".message .text").all_inner_texts() == ["Second conversation", "kept"]
    assert page.input_value("#temperature") == "0.3" and page.inner_text("#theme") == "Theme: light"
    assert page.input_value("#system") == ""
    page.click("text=First conversation")
    assert page.input_value("#system") == "A system text"
    page.get_by_label("Delete: First conversation").click()
    page.reload()
    assert page.locator("#conversations .open").all_inner_texts() == ["Second conversation"]


@needs_browser
def test_two_tabs(page):
    """Each keeps what the other does, and shows it; what goes on in one is not disturbed."""
    other = page.context.new_page()
    other.goto(page.url)

    def titles(tab):
        return tab.locator("#conversations .open").all_inner_texts()

    faked(page, delta("one"))
    send(page, "First tab")
    answered(page)
    until(other, "document.querySelectorAll('#conversations .open').length === 2")  # its own is new and empty
    assert titles(other) == ["New conversation", "First tab"]
    waiting = []
    other.route("**/v1/chat/completions", lambda route: waiting.append(route))
    send(other, "Second tab")
    other.wait_for_selector("#stop:visible")
    page.click("#new")
    send(page, "First tab again")
    answered(page)
    until(other, "document.querySelectorAll('#conversations .open').length === 3")
    assert other.is_visible("#stop") and other.locator(".message .text").all_inner_texts() == ["Second tab", ""]
    waiting[0].fulfill(body=f"data: {json.dumps(delta('two'))}\n\ndata: [DONE]\n\n", content_type="text/event-stream")
    assert answered(other) == ["two"]
    until(page, "document.querySelectorAll('#conversations .open').length === 3")
    # The same conversation in both: what one adds, the other shows, and what one deletes is gone.
    page.click("text=Second tab")
    faked(other, delta("three"))
    send(other, "And more")
    assert answered(other, 2) == answered(page, 2) == ["two", "three"]
    other.click("#theme")
    page.locator("#temperature").fill("0.3")  # another setting, of a tab that has not seen the first
    page.get_by_label("Delete: Second tab").click()
    until(other, "document.querySelector('#conversations .open').textContent === 'New conversation'")  # for the one it showed
    assert titles(other)[1:] == ["First tab again", "First tab"]
    for tab in (page, other):
        tab.reload()
        assert sorted(titles(tab)) == ["First tab", "First tab again"]
        assert tab.inner_text("#theme") == "Theme: light" and tab.input_value("#temperature") == "0.3"


@needs_browser
def test_two_tabs_in_one_conversation(page):
    """What both add at once is kept, as two conversations; what is deleted while it is answered is kept with its answer."""
    faked(page, delta("one"))
    send(page, "A question")
    answered(page)
    other = page.context.new_page()
    other.goto(page.url)
    until(other, "document.querySelectorAll('.assistant').length === 1")
    waiting = {tab: [] for tab in (page, other)}
    for tab, routes in waiting.items():
        tab.unroute("**/v1/chat/completions")
        tab.route("**/v1/chat/completions", lambda route, request, routes=routes: routes.append(route))

    def finish(tab, text):
        body = f"data: {json.dumps(delta(text))}\n\ndata: [DONE]\n\n"
        waiting[tab].pop().fulfill(body=body, content_type="text/event-stream")
        return answered(tab, 2)

    send(page, "Here")
    until(other, "document.querySelector('#messages').textContent.includes('Here')")  # a question is kept when it is asked
    finish(page, "two")
    until(other, "document.querySelectorAll('.assistant').length === 2")
    for tab in (page, other):  # both ask before they hear of each other
        tab.evaluate("void (window.held = window.onstorage, window.onstorage = null)")
    for tab, text in ((page, "In one"), (other, "In the other")):
        send(tab, text)
        tab.wait_for_selector("#stop:visible")
    for tab in (page, other):
        tab.evaluate("void (window.onstorage = window.held)")
        body = f"data: {json.dumps(delta('end'))}\n\ndata: [DONE]\n\n"
        waiting[tab].pop().fulfill(body=body, content_type="text/event-stream")
        answered(tab, 3)
    for tab in (page, other):
        tab.reload()
        kept = tab.evaluate("Object.entries(localStorage).filter(([key]) => key.includes('.conversation.'))")
        texts = [[message["content"] for message in json.loads(text)["messages"]] for _, text in kept]
        start = ["A question", "one", "Here", "two"]
        assert sorted(texts) == [[*start, "In one", "end"], [*start, "In the other", "end"]]
        assert tab.locator("#conversations .open").count() == 2
    # Deleted in one while the other's answer comes.
    page.click("#conversations .open >> nth=0")
    asked_in = page.locator(".message .text").all_inner_texts()[-2]
    send(page, "Still there?")
    page.wait_for_selector("#stop:visible")
    other.wait_for_timeout(100)
    other.locator("#conversations li", has=other.locator(".open")).nth(0).locator("button").nth(1).click()
    waiting[page].pop().fulfill(body=f"data: {json.dumps(delta('yes'))}\n\ndata: [DONE]\n\n", content_type="text/event-stream")
    assert answered(page, 4)[-1] == "yes" and asked_in
    page.reload()
    assert page.locator("#conversations .open").count() == 2


@needs_browser
def test_a_full_browser(page):
    """What there is no room for stays in the tab, is said, and is kept as soon as there is room."""
    faked(page, delta("small"))
    send(page, "Small")
    answered(page)
    page.evaluate("for (let size = 4 << 20; size; size >>= 1) try { localStorage.setItem('x' + size, 'y'.repeat(size)); } catch {}")
    page.click("#new")
    send(page, "Large " * 500)
    answered(page)
    assert "keeps no more data" in page.inner_text("#error")
    page.evaluate("Object.keys(localStorage).filter((key) => key.startsWith('x')).forEach((key) => localStorage.removeItem(key))")
    page.get_by_label("Delete: Small").click()
    page.reload()
    assert page.locator(".message .text").all_inner_texts() == [("Large " * 500).strip(), "small"]


@needs_browser
def test_left_before_the_answer(page):
    """What has no text is no answer: neither kept nor sent, and the conversation goes on."""
    page.route("**/v1/chat/completions", lambda route: None)  # never answered
    send(page, "Anybody there?")
    page.wait_for_selector("#stop:visible")
    page.reload()
    assert page.locator(".message .text").all_inner_texts() == ["Anybody there?"]
    page.unroute("**/v1/chat/completions")
    bodies = []
    page.on("request", lambda request: bodies.append(request.post_data) if request.method == "POST" else None)
    faked(page, delta(" \n"))
    send(page, "Hello?")
    answered(page, 0)
    assert page.locator(".message .text").all_inner_texts() == ["Anybody there?", "Hello?"]
    faked(page, delta("yes"))
    send(page, "Well?")
    answered(page)
    assert json.loads(bodies[-1])["messages"] == [{"role": "user", "content": "Anybody there?\n\nHello?\n\nWell?"}]
    assert page.locator(".message .text").all_inner_texts()[-1] == "yes"


@needs_browser
def test_html_is_text(page):
    """In answers, questions, titles, and errors."""
    faked(page, delta(HTML))
    send(page, HTML)
    assert answered(page) == [HTML]
    assert page.locator(".user .text").inner_text() == HTML
    assert page.locator("#messages script, #messages img, #messages b, #conversations img").count() == 0
    page.unroute("**/v1/chat/completions")
    faked(page, {"error": {"message": HTML}})
    send(page, "Again")
    page.wait_for_selector("#error:not([hidden])")
    assert page.inner_text("#error") == HTML
    assert page.evaluate("window.hacked") is None


# What goes wrong --------------------------------------------------------------------------------------------------------


@needs_browser
def test_errors_are_said(page):
    """What the server says; a server that is gone; a stream that ends in the middle. The question stays, and can be asked again."""
    page.fill("#length", "100000")
    page.press("#length", "Tab")
    send(page, "Too much")
    page.wait_for_selector("#error:not([hidden])")
    assert "this server's limit is 256 in all" in page.inner_text("#error")
    page.fill("#length", "5")
    page.press("#length", "Tab")
    page.route("**/v1/chat/completions", lambda route: route.abort())
    page.click("text=Try again")
    until(page, "document.getElementById('error').textContent.includes('cannot be reached')")
    page.unroute("**/v1/chat/completions")
    page.route("**/v1/chat/completions", lambda route: route.fulfill(body=f"data: {json.dumps(delta('Half'))}\n\n"))
    page.click("text=Try again")
    until(page, "document.getElementById('error').textContent.includes('in the middle of the answer')")
    assert answered(page) == ["Half"]
    page.unroute("**/v1/chat/completions")
    page.click("text=Regenerate")
    until(page, "document.getElementById('error').hidden")
    assert answered(page)[0] not in ("", "Half")


@needs_browser
def test_unanswered_questions_are_part_of_the_next(page):
    """Roles have to alternate."""
    page.route("**/v1/chat/completions", lambda route: route.abort())
    send(page, "One")
    page.wait_for_selector("#error:not([hidden])")
    page.unroute("**/v1/chat/completions")
    faked(page, delta("Both"))
    with page.expect_request("**/v1/chat/completions") as asked:
        send(page, "Two")
    assert asked.value.post_data_json["messages"] == [{"role": "user", "content": "One\n\nTwo"}]
    assert answered(page) == ["Both"]


@needs_browser
def test_a_server_that_wants_a_key(browser, lm):
    with running(lm, limits=Limits(api_key="sesame")) as (address, _):
        context = browser.new_context()
        context.set_default_timeout(BROWSER_PATIENCE)
        page = context.new_page()
        page.goto("http://{}:{}/".format(*address))
        page.wait_for_selector("#error:not([hidden])")
        assert "API key is missing or wrong" in page.inner_text("#error")
        page.fill("#key", "sesame")
        page.press("#key", "Tab")
        page.wait_for_selector("#model option", state="attached")
        page.wait_for_selector("#error", state="hidden")
        page.fill("#length", "3")
        page.press("#length", "Tab")
        send(page, "Hello")
        assert len(answered(page)) == 1
        assert "sesame" not in page.evaluate("JSON.stringify(localStorage)")
        context.close()


@needs_browser
def test_what_was_kept_is_not_readable(page):
    """The page begins anew."""
    page.evaluate("localStorage.setItem('keras_gemma2.conversation.broken', '{broken')")
    page.evaluate("localStorage.setItem('keras_gemma2.settings', '[1')")
    with page.expect_console_message(lambda message: "cannot be read" in message.text):
        page.reload()
    faked(page, delta("fine"))
    send(page, "Hello")
    assert answered(page) == ["fine"]


# How it is used ---------------------------------------------------------------------------------------------------------


@needs_browser
def test_by_keyboard_alone(page):
    """Every control is reached by Tab, in an order, with a name and a visible focus."""
    faked(page, delta("typed"))
    assert page.evaluate("document.activeElement.id") == "input"
    page.keyboard.type("Line one")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("Line two")
    page.keyboard.press("Enter")
    answered(page)
    assert page.locator(".user .text").inner_text() == "Line one\nLine two"
    page.focus(".skip")
    side = ["new", "Line one\nLine two", "×", "system", "temperature", "length", "key"]
    wanted = ["model", "theme", *side, "messages", "Copy", "Copy", "Regenerate", "input", "send"]
    for name in wanted:
        page.keyboard.press("Tab")
        reached, called, outline = page.evaluate(
            """() => { const e = document.activeElement; return [e.id || e.textContent,
                 (e.labels?.[0]?.textContent || e.ariaLabel || e.textContent).trim(), getComputedStyle(e).outlineStyle] }"""
        )
        assert reached == name and called and outline != "none"


@needs_browser
def test_a_narrow_screen(page):
    """Nothing sticks out; the side is behind a button."""
    page.set_viewport_size({"width": 320, "height": 600})
    faked(page, delta("a" * 300 + " " + "word " * 50))
    send(page, "b" * 200)
    answered(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= 320
    assert page.evaluate("document.documentElement.scrollHeight") <= 600
    assert not page.is_visible("#new")
    page.click("#menu")
    assert page.get_attribute("#menu", "aria-expanded") == "true"
    page.click("#new")
    assert page.get_attribute("#menu", "aria-expanded") == "false" and not page.is_visible("#new")


@needs_browser
def test_dark_and_light(page):
    """As the system has it, unless told otherwise; all text is readable: a contrast of 4.5 at least (WCAG 2.1, AA)."""
    faked(page, delta("text"))
    send(page, "question")
    answered(page)
    backgrounds = []
    for scheme, clicks in (("light", 0), ("dark", 0), ("dark", 1), ("light", 1)):
        page.emulate_media(color_scheme=scheme)
        for _ in range(clicks):
            page.click("#theme")
        backgrounds.append(page.evaluate("getComputedStyle(document.body).backgroundColor"))
        colors = page.evaluate(
            """() => [...document.querySelectorAll('.text, h1, .note, #send, #theme, .open, .tools button')].map((e) => {
                 let under = e; while (getComputedStyle(under).backgroundColor === 'rgba(0, 0, 0, 0)') under = under.parentElement;
                 return [getComputedStyle(e).color, getComputedStyle(under).backgroundColor] })"""
        )
        assert len(colors) > 6 and all(contrast(*pair) >= 4.5 for pair in colors)
    assert backgrounds[0] == backgrounds[2] != backgrounds[1] == backgrounds[3]


def contrast(first, second):
    def luminance(color):
        parts = [int(part) / 255 for part in re.findall(r"\d+", color)[:3]]
        red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    low, high = sorted((luminance(first), luminance(second)))
    return (high + 0.05) / (low + 0.05)


# The files --------------------------------------------------------------------------------------------------------------


def fetched(server, path):
    connection = http.client.HTTPConnection(*server[0], timeout=PATIENCE)
    connection.putrequest("GET", path, skip_host=False)  # as it is: `request` would mend some paths
    connection.endheaders()
    answer = connection.getresponse()
    found = answer.status, dict(answer.getheaders()), answer.read()
    connection.close()
    return found


def test_the_files_are_given(server):
    for path, name in NAMES.items():
        status, headers, content = fetched(server, path)
        assert (status, content) == (200, (FOLDER / name).read_bytes())
        assert "default-src 'none'" in headers["content-security-policy"] and headers["x-content-type-options"] == "nosniff"
    assert {path.name for path in FOLDER.iterdir()} == set(NAMES.values())


@pytest.mark.parametrize(
    "path",
    [
        "/../app.py",
        "/page/../../app.py",
        "/%2e%2e/app.py",
        "/..%2fapp.py",
        "/%2e%2e%2f%2e%2e%2f__init__.py",
        "/..\\app.py",
        "/....//app.py",
        "//etc/passwd",
        "/chat.js/../../app.py",
        "/chat.js%00.py",
        "/index.html",
        "/%ff%fe",
    ],
)
def test_paths_that_climb(server, path):
    """There is nothing to climb out of: a file has one path."""
    status, _, content = fetched(server, path)
    assert status == 404 and json.loads(content)["error"]["type"] == "invalid_request_error"


def test_no_address_is_named():
    """The page needs nothing but the server that it comes from, and is small."""
    texts = [path.read_text(encoding="utf-8") for path in FOLDER.iterdir()]
    assert not any(re.search(r"https?://|//cdn", text.replace("http://www.w3.org/2000/svg", "")) for text in texts)
    assert sum(map(len, texts)) < 40_000
    assert not any(re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", text) for text in texts)
