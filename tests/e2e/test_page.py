"""The web page in headless Chromium: chat, stop, settings, live view, keys, light and dark, on a phone. Screenshots go to
MILLRACE_SCREENSHOTS when that is set."""

import os
import pathlib

import pytest

import harness
from browser import Browser, chromium
from namespaces import Pair, ip

pytestmark = pytest.mark.skipif(chromium() is None, reason="chromium is not installed (deploy/packages --tests)")
KEY = "sk-page-0123456789"


@pytest.fixture(scope="module")
def shots(tmp_path_factory):
    path = os.environ.get("MILLRACE_SCREENSHOTS")
    directory = pathlib.Path(path) if path else tmp_path_factory.mktemp("screenshots")
    directory.mkdir(parents=True, exist_ok=True)
    return directory


@pytest.fixture
def browse():
    opened = []

    def start(**options):
        opened.append(Browser(**options))
        return opened[-1]
    yield start
    for browser in opened:
        browser.close()


def last_answer(browser):
    return browser.run("[...document.querySelectorAll('.message.assistant .content')].pop()?.textContent || ''")


def ask(browser, text):
    browser.type("#input", text)
    browser.click("#send")


def test_chat_stream_stop_and_live_view(server, browse, shots):
    browser = browse()
    browser.open(f"http://{server.address}/")
    browser.wait("document.querySelector('#status').className === 'good'")
    assert browser.run("document.querySelectorAll('.worker').length") == 2
    browser.run("document.querySelector('#temperature').value = 0")
    ask(browser, "What is a violin?")
    browser.wait("document.querySelector('.figures')?.textContent.includes('tokens/s')")
    assert last_answer(browser) == "A violin is a bowed stringed instrument that is the highest member of the violin family."
    assert ", stop" in browser.run("document.querySelector('.figures').textContent")
    browser.wait("[...document.querySelectorAll('.request')].some(r => r.textContent.includes('ok'))")
    widths = browser.run("[...document.querySelector('.request .bar').children].map(i => i.getBoundingClientRect().width)")
    assert len(widths) == 4 and sum(widths) > 0, "a bar with the phases of the request"
    browser.screenshot(shots / "light.png")
    ask(browser, "And an island?")  # the conversation goes on
    browser.wait("document.querySelectorAll('.figures')[1]?.textContent.includes('tokens/s')")
    assert browser.run("document.querySelectorAll('.message.user').length") == 2
    browser.run("document.querySelector('#temperature').value = 2; document.querySelector('#input').focus()")
    browser.call("Input.insertText", text="Tell me everything")
    browser.call("Input.dispatchKeyEvent", type="keyDown", key="Enter", windowsVirtualKeyCode=13, text="\r")
    browser.wait("document.querySelectorAll('.message.assistant')[2]?.querySelector('.content').textContent.length > 0")
    if browser.run("!document.querySelector('#stop').disabled"):
        browser.click("#stop")
        browser.wait("document.querySelector('#stop').disabled")
        assert browser.run("[...document.querySelectorAll('.figures')].pop().textContent") in ("stopped",) or \
            "tokens/s" in browser.run("[...document.querySelectorAll('.figures')].pop().textContent")
    harness.wait_until(lambda: '"server_load":0' in harness.request(server.address, "GET", "/load")[2], 10, "the stop arrives")
    browser.click("#clear")
    assert browser.run("document.querySelectorAll('.message').length") == 0
    assert browser.complaints() == []
    assert all(url.startswith(f"http://{server.address}/") or url.startswith("data:") for url in browser.requested() if
               url != "about:blank"), "no external resource"


def test_a_rail_dies(long_model, logs, browse, shots):
    """Two rails between the workers; one is cut: the page shows it, answers go on, and it comes back."""
    directory = logs / "page-rails"
    directory.mkdir()
    with Pair(links=2) as pair:
        def worker(role, side):
            return harness.Process(directory, role, [
                "worker", "--role", role, "--model", long_model, "--listen", f"{pair.address(side, 0)}:7001", "--rail", pair.address(side, 0),
                "--rail", pair.address(side, 1), "--threads", 1, "--kv-memory", "64MiB"], prefix=pair.prefix(side))

        processes = harness.start_all([lambda: worker("prefill", 1), lambda: worker("decode", 0)])
        try:
            processes.append(harness.Process(directory, "gateway", [
                "gateway", "--model", long_model, "--listen", "127.0.0.1:0", "--prefill", f"{pair.address(1, 0)}:7001", "--decode",
                f"{pair.address(0, 0)}:7001"], prefix=pair.prefix(0)).wait_started())
            address = processes[-1].address
            pair.run(0, lambda: harness.wait_ready(address))
            browser = browse(prefix=pair.prefix(0), height=1000)
            browser.open(f"http://{address}/")
            browser.wait("document.querySelector('#status').className === 'good'")
            answers = "[...document.querySelectorAll('.figures')].filter(f => f.textContent.includes('tokens/s')).length"
            ask(browser, "What is a violin?")
            browser.wait(f"{answers} === 1")
            rail = "[...document.querySelectorAll('.path')].find(p => p.textContent.includes('10.77.1.'))"
            browser.wait(f"{rail}?.classList.contains('up')")
            ip("-n", pair.names[1], "link", "set", "rail1", "down")
            browser.wait(f"!{rail}.classList.contains('up') && {rail}.textContent.match(/down|suspect|connecting/)")
            browser.screenshot(shots / "rail-down.png")
            ask(browser, "What is an island?")
            browser.wait(f"{answers} === 2")
            ip("-n", pair.names[1], "link", "set", "rail1", "up")
            browser.wait(f"{rail}.classList.contains('up')")
            browser.screenshot(shots / "rail-back.png")
            assert browser.complaints() == []
        finally:
            codes = [process.stop() for process in reversed(processes)]
        assert codes == [0, 0, 0]


def test_dark_on_a_phone(server, browse, shots):
    browser = browse(width=390, height=844, dark=True)
    browser.open(f"http://{server.address}/")
    browser.wait("document.querySelector('#status').className === 'good'")
    ask(browser, "What is a telescope?")
    browser.wait("document.querySelector('.figures')?.textContent.includes('tokens/s')")
    assert browser.run("document.documentElement.scrollWidth <= window.innerWidth"), "nothing is wider than the phone"
    assert browser.run("getComputedStyle(document.body).backgroundColor") == "rgb(18, 22, 27)"
    browser.screenshot(shots / "phone-dark.png")
    assert browser.complaints() == []


def test_with_a_key(logs, model, browse, tmp_path, shots):
    keys = tmp_path / "keys"
    keys.write_text(f"page {KEY}\n")
    directory = logs / "page"
    directory.mkdir()
    process = harness.Process(directory, "page", ["serve", "--model", model, "--listen", "127.0.0.1:0", "--threads", 1, "--kv-memory",
                                                  "32MiB", "--aggregated", "--api-keys", keys]).wait_started()
    try:
        harness.wait_ready(process.address)
        browser = browse()
        browser.open(f"http://{process.address}/")
        browser.wait("document.querySelector('#status').textContent.includes('API key')")
        browser.type("#key", KEY)
        browser.run("document.querySelector('#key').dispatchEvent(new Event('change', {bubbles: true}))")
        browser.wait("document.querySelector('#status').className === 'good'")
        ask(browser, "What is a violin?")
        browser.wait("document.querySelector('.figures')?.textContent.includes('tokens/s')")
        assert browser.run("document.querySelector('.message.error')") is None
        browser.screenshot(shots / "key.png")
        assert KEY not in process.output()
    finally:
        assert process.stop() == 0
