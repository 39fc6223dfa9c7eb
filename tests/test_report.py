"""report.py: the page and its folder; with chromium and selenium installed also the page in use."""
import errno
import html.parser
import io
import json
import math
import re
import shutil

import numpy as np
import pytest
from PIL import Image

import images
import report
from report import Column, Report

COLUMNS = [Column("psnr", "PSNR-Y, dB", "higher", 2), Column("niqe", "NIQE", "lower", 3), Column("s", "s/MP")]
EVIL = ["plain.png", "</script><script>evil = 1</script>\"'&{{data}}.png", "絵\n<!--  \udcff.png"]


def picture(h=200, w=300, seed=0):
    """A soft random picture (h, w, 3) uint8."""
    noise = np.random.default_rng(seed).integers(0, 256, (h // 8 + 1, w // 8 + 1, 3), np.uint8)
    return np.asarray(Image.fromarray(noise).resize((w, h), Image.BICUBIC))


def damage(image, y, x, amount=60, side=24):
    """Change the levels of one square."""
    image = image.copy()
    part = image[y:y + side, x:x + side].astype(int)
    image[y:y + side, x:x + side] = np.where(part > 127, part - amount, part + amount)
    return image


def page_data(page):
    """The data in index.html for its script."""
    text = (page.folder / "index.html").read_text(encoding="utf-8")
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)[1])


def read_file(page, file):
    return np.asarray(Image.open(page.folder / file).convert("RGB"))


class Tables(html.parser.HTMLParser):
    """Parse the tables of a page as lists of rows of (text, class), and check that all tags close."""
    VOID = {"meta", "link", "img", "br", "input"}

    def __init__(self, text):
        super().__init__()
        self.open, self.tables, self.scripts = [], [], 0
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        if tag not in self.VOID:
            self.open.append(tag)
        self.scripts += tag == "script"
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append(["", dict(attributes).get("class")])

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if {"td", "th"} & set(self.open):
            self.tables[-1][-1][-1][0] += data


def tables(page):
    parsed = Tables(page.finish().read_text(encoding="utf-8"))
    assert parsed.open == ["html"] and parsed.scripts == 2
    return parsed.tables


def test_the_page_keeps_every_pixel_and_any_name(tmp_path):
    page = Report(tmp_path / "a page", EVIL[1], COLUMNS, note="two\n<lines>")
    added = {}
    for i, name in enumerate(EVIL):
        added[i] = {"bicubic": picture(seed=i), EVIL[2]: picture(seed=i + 10), "HR": picture(seed=i + 20)}
        page.add(name, added[i], {"bicubic": {"psnr": 30}, EVIL[2]: {"psnr": 31}}, "HR")
    page.finish()
    data = page_data(page)
    assert [p["name"] for p in data] == EVIL
    for i, p in enumerate(data):
        assert [layer["label"] for layer in p["layers"]] == ["bicubic", EVIL[2], "HR"]
        assert (p["width"], p["height"]) == (300, 200)
        for layer, expected in zip(p["layers"], added[i].values()):
            assert np.array_equal(read_file(page, layer["file"]), expected)
    each = tables(page)[1]
    assert [row[0][0] for row in each[1:]] == [name.replace("\udcff", "?") for name in EVIL]
    assert {p.name for p in tmp_path.iterdir()} == {"a page"}
    assert {p.name for p in page.folder.iterdir()} == {"index.html", "report-files"}
    assert not list(page.folder.rglob("*.part"))


def test_a_picture_wider_than_webp_allows(tmp_path):
    page, wide = Report(tmp_path / "page", "wide", COLUMNS), picture(2, 16400)
    page.add("wide", {"bicubic": wide, "HR": wide}, {"bicubic": {"psnr": 30}}, "HR")
    page.finish()
    assert np.array_equal(read_file(page, page_data(page)[0]["layers"][0]["file"]), wide)


def test_best_and_missing_values(tmp_path):
    page = Report(tmp_path / "p", "t", COLUMNS)
    b = {"psnr": 32.001, "niqe": 4, "s": 2}
    rows = [{"a": {"psnr": 30, "niqe": 5, "s": 1}, "b": b, "c": {"niqe": math.nan}},
            {"a": {"psnr": 34, "niqe": 3, "s": 1}, "b": b, "c": {"psnr": math.inf}}]
    for i, own in enumerate(rows):
        page.add(str(i), {label: picture(40, 50) for label in own}, own)
    mean, psnr, niqe, seconds = tables(page)
    # c has no PSNR for one picture, so the means are over the other one
    assert mean[0][1:] == [["PSNR-Y, dB (1 of 2 pictures) ↑", None], ["NIQE ↓", None], ["s/MP", None]]
    assert mean[1] == [["a", None], ["34.00", None], ["4.000", "best"], ["1.00", None]]
    assert mean[2] == [["b", None], ["32.00", None], ["4.000", "best"], ["2.00", None]]
    assert mean[3] == [["c", None], ["inf", "best"], ["-", None], ["-", None]]
    assert psnr[1:] == [[["0", None], ["30.00", None], ["32.00", "best"], ["-", None]],
                        [["1", None], ["34.00", None], ["32.00", None], ["inf", "best"]]]
    assert niqe[1:] == [[["0", None], ["5.000", None], ["4.000", "best"], ["-", None]],
                        [["1", None], ["3.000", "best"], ["4.000", None], ["-", None]]]
    assert [cell[1] for row in seconds for cell in row] == [None] * 12


def test_crops_show_the_largest_errors(tmp_path):
    hr = picture(400, 600)
    noise = np.random.default_rng(5).integers(-6, 7, hr.shape)
    a = damage(np.clip(hr + noise, 0, 255).astype(np.uint8), 40, 50)
    b = damage(damage(hr, 310, 450), 300, 60, amount=40)
    page = Report(tmp_path / "p", "t", COLUMNS)
    page.add("x", {"a": a, "b": b, "HR": hr}, {}, "HR")
    page.finish()
    p, = page_data(page)
    # the last method comes first: the worst of b, the worst of a, the second of b
    assert [(r["method"], r["y"], r["x"]) for r in p["regions"]] == [("b", 288, 384), ("a", 0, 0), ("b", 288, 0)]
    strip = read_file(page, p["crops"])
    assert np.array_equal(strip[:96], np.concatenate([image[288:384, 384:480] for image in (a, b, hr)], 1))
    assert np.array_equal(strip[96:192], np.concatenate([image[:96, :96] for image in (a, b, hr)], 1))
    assert strip.shape == (3 * 96, 3 * 96, 3)


def test_small_equal_and_single_pictures(tmp_path):
    page = Report(tmp_path / "p", "t", COLUMNS)
    hr = picture(100, 500)
    page.add("small", {"a": picture(20, 30, 1), "HR": picture(20, 30)}, {}, "HR")
    page.add("equal", {"a": hr, "HR": hr}, {}, "HR")
    page.add("single", {"a": hr}, {})
    page.finish()
    small, equal, single = page_data(page)
    assert small["side"] == 20 and len(small["regions"]) == 1
    assert equal["regions"] == single["regions"] == [] and equal["crops"] == ""


def test_methods_are_compared_with_each_other_without_a_reference(tmp_path):
    a = picture(300, 500)
    page = Report(tmp_path / "p", "t", COLUMNS)
    page.add("two", {"a": a, "b": damage(a, 200, 300)}, {})
    page.finish()
    p, = page_data(page)
    assert p["regions"][0] == {"method": "", "y": 192, "x": 288}
    assert not any(layer["heat"] for layer in p["layers"])


def test_heat_map(tmp_path):
    hr = picture(200, 300)
    page = Report(tmp_path / "p", "t", COLUMNS)
    page.add("x", {"a": damage(hr, 100, 200), "HR": hr}, {}, "HR")
    page.finish()
    a, reference = page_data(page)[0]["layers"]
    assert reference["heat"] == ""
    heat = np.asarray(Image.open(page.folder / a["heat"])).astype(int)
    assert heat.shape == (100, 150, 4)
    assert heat[50:62, 100:112, 3].mean() > 150 and heat[:48, :, 3].max() == heat[64:, :, 3].max() == 0
    white = report.draw_heat_map(np.full((4, 4), report.HEAT_WHITE, np.float32))
    assert (white == 255).all()


def test_an_interrupted_page_has_the_pictures_added_before(tmp_path, monkeypatch):
    page = Report(tmp_path / "p", "t", COLUMNS)
    both = {"a": picture(40, 50), "HR": picture(40, 50, 1)}
    page.add("first", both, {"a": {"psnr": 30}}, "HR")
    real, written = report.write_atomic, []

    def interrupted(path, data):
        written.append(path)
        if len(written) == 2:
            raise KeyboardInterrupt
        real(path, data)
    monkeypatch.setattr(report, "write_atomic", interrupted)
    with pytest.raises(KeyboardInterrupt):
        page.add("second", both, {"a": {"psnr": 40}}, "HR")
    monkeypatch.undo()
    assert [row[0][0] for row in tables(page)[1][1:]] == ["first"]
    page.add("third", both, {"a": {"psnr": 34}}, "HR")
    assert tables(page)[0][1][1][0] == "32.00"
    assert [p["name"] for p in page_data(page)] == ["first", "third"]
    assert all((page.folder / layer["file"]).exists() for p in page_data(page) for layer in p["layers"])


def test_no_picture_at_all(tmp_path):
    page = Report(tmp_path / "p", "t", [])
    assert tables(page) == [[[["method", None]]]] and page_data(page) == []


def test_files_are_whole_or_absent(tmp_path, monkeypatch):
    page = Report(tmp_path / "p", "t", COLUMNS)
    page.finish()
    before = (page.folder / "index.html").read_bytes()
    page.add("x", {"a": picture(40, 50)}, {})

    def full_disk(*_):
        raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr("os.replace", full_disk)
    with pytest.raises(images.UserError, match="index.html: No space left"):
        page.finish()
    assert (page.folder / "index.html").read_bytes() == before and not list(page.folder.rglob("*.part"))


def test_a_folder_in_use_is_refused(tmp_path):
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(images.UserError, match="--overwrite"):
        Report(tmp_path, "t", COLUMNS)
    with pytest.raises(images.UserError, match="mine.txt"):
        Report(tmp_path / "mine.txt", "t", COLUMNS).add("a", {"a": picture(40, 50)}, {})
    page = Report(tmp_path, "t", COLUMNS, overwrite=True)
    for name in "ab":
        page.add(name, {"a": picture(40, 50)}, {})
    page.finish()
    page = Report(tmp_path, "t", COLUMNS, overwrite=True)
    assert not (tmp_path / "index.html").exists()       # its pictures are deleted
    page.add("c", {"a": picture(40, 50)}, {})
    page.finish()
    assert sorted(p.name for p in (tmp_path / "report-files").iterdir()) == ["0001-0.webp"]
    assert (tmp_path / "mine.txt").read_text() == "keep"


# ----------------------------------------------------------------------------------------------------
# the page in chromium


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    program, driver = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
    if not program or not driver:
        pytest.skip("chromium and chromedriver are not installed")
    options = webdriver.ChromeOptions()
    options.binary_location = program
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    for flag in ("headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-sync",
                 "disable-background-networking", "disable-component-update", "disable-dev-shm-usage",
                 "window-size=1200,900", f"user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(f"--{flag}")
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield browser
    browser.quit()


COLORS = {"bicubic": (200, 40, 40), "ours": (40, 160, 60), "HR": (40, 60, 200)}


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    page = Report(tmp_path_factory.mktemp("a ページ"), EVIL[1], COLUMNS, "a note")
    for i, (name, psnr) in enumerate(zip(EVIL, (31, math.nan, 9.5))):
        flat = {label: np.full((400, 600, 3), color, np.uint8) for label, color in COLORS.items()}
        flat["ours"][250:300, 100 + 100 * i:150 + 100 * i] = 255
        page.add(name, flat, {"bicubic": {"psnr": 20}, "ours": {"psnr": psnr}}, "HR")
    return page.finish()


@pytest.fixture
def browser(chromium, page):
    """The page, opened anew. At the end the console must have no warning."""
    chromium.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    chromium.get("about:blank")
    chromium.get_log("performance")
    chromium.get(page.as_uri())
    yield chromium
    assert [entry for entry in chromium.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")] == []


def find(browser, css):
    return browser.find_element("css selector", css)


def view(browser):
    """(scale, left, top) of the two layers, which must be equal."""
    both = browser.execute_script("""return [...document.querySelectorAll(".layer")].map(layer => {
        const m = new DOMMatrix(getComputedStyle(layer).transform);
        return [m.a, m.e, m.f, m.b, m.d - m.a]})""")
    assert both[0] == both[1] and both[0][3:] == [0, 0]
    return both[0][:3]


def split(browser):
    """The position of the slider in percent; checks that the two sides end there."""
    at, left, right = browser.execute_script("""return [document.getElementById("slider").style.left,
        ...[...document.querySelectorAll(".side")].map(side => getComputedStyle(side).clipPath)]""")
    at = float(at.rstrip("%"))
    ends = [[float(v) for v in re.findall(r"([\d.]+)(?:%|px)?", text)] for text in (left, right)]
    assert left.startswith("inset(0px ") and right.startswith("inset(0px 0px 0px ")
    assert ends[0][1] == pytest.approx(100 - at, abs=0.01) and ends[1][3] == pytest.approx(at, abs=0.01)
    return at


def stage_colors(browser):
    """The colors of the stage on the screen at 1/4 and 3/4 of its width, at half its height."""
    image = Image.open(io.BytesIO(find(browser, "#stage").screenshot_as_png)).convert("RGB")
    return [image.getpixel((image.width * k // 4, image.height // 2)) for k in (1, 3)]


def wait(browser, script):
    from selenium.webdriver.support.ui import WebDriverWait
    return WebDriverWait(browser, 10).until(lambda b: b.execute_script(f"return {script}"))


def loaded(browser):
    return wait(browser, "document.images.length >= 2 && "
                         "[...document.images].every(i => i.complete && i.naturalWidth)")


def test_the_page_loads_only_the_pictures_in_view(browser):
    loaded(browser)
    assert stage_colors(browser) == [COLORS["bicubic"], COLORS["ours"]]
    assert browser.title == EVIL[1] and find(browser, "h1").text == EVIL[1]
    assert browser.execute_script("return typeof evil") == "undefined"
    options = browser.find_elements("css selector", "#picture option")
    assert [option.get_property("textContent") for option in options[:2]] == EVIL[:2]
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    requested = {e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"}
    requested = {url for url in requested if not url.startswith(("about:", "data:"))}
    assert all(url.startswith("file://") for url in requested)
    files = {url.rsplit("/", 1)[1] for url in requested}
    assert files == {"index.html", "0001-0.webp", "0001-1.webp", "0001-crops.webp"}


def test_pointer_and_keys_move_the_slider(browser):
    from selenium.webdriver import ActionChains, Keys
    slider, width = find(browser, "#slider"), find(browser, "#stage").size["width"]
    assert split(browser) == 50
    drag = ActionChains(browser).move_to_element_with_offset(slider, 0, 60).click_and_hold()
    drag.move_by_offset(150, 5).perform()
    assert split(browser) == pytest.approx(50 + 100 * 150 / width, abs=0.5)
    ActionChains(browser).release().move_by_offset(-300, 0).perform()
    assert split(browser) == pytest.approx(50 + 100 * 150 / width, abs=0.5)
    slider.send_keys(Keys.HOME)
    assert split(browser) == 0
    slider.send_keys(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
    assert split(browser) == 2 and slider.get_attribute("aria-valuenow") == "2"
    slider.send_keys(Keys.END)
    assert split(browser) == 100 and stage_colors(browser) == [COLORS["bicubic"]] * 2


def test_both_sides_zoom_and_move_together(browser):
    from selenium.webdriver import ActionChains, Keys
    from selenium.webdriver.common.actions.wheel_input import ScrollOrigin
    stage = find(browser, "#stage")
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", stage)
    whole = view(browser)
    ActionChains(browser).scroll_from_origin(ScrollOrigin.from_element(stage, 40, 30), 0, -500).perform()
    scale, left, top = view(browser)
    assert scale == pytest.approx(whole[0] * math.e, rel=0.02)
    at = [stage.size["width"] // 2 + 40, stage.size["height"] // 2 + 30]
    for k in (0, 1):        # the pixel under the pointer did not move
        assert (at[k] - whole[k + 1]) / whole[0] == pytest.approx((at[k] - (left, top)[k]) / scale, abs=1)
    assert "pixelated" in stage.get_attribute("class")
    stage.send_keys(Keys.ARROW_RIGHT, Keys.ARROW_UP)
    assert view(browser) == [scale, pytest.approx(left - 60), pytest.approx(top + 60)]
    drag = ActionChains(browser).move_to_element_with_offset(stage, -90, 0).click_and_hold()
    drag.move_by_offset(25, -35).perform()
    ActionChains(browser).release().perform()
    assert view(browser) == [scale, pytest.approx(left - 35, abs=1), pytest.approx(top + 25, abs=1)]
    stage.send_keys("+")
    assert view(browser)[0] == pytest.approx(scale * 1.25, rel=1e-4)
    stage.send_keys("--")
    assert view(browser)[0] == pytest.approx(scale * 0.8, rel=1e-4)
    stage.send_keys("1")
    assert view(browser)[0] == 1 and find(browser, "#zoom-level").text == "100%"
    stage.send_keys("0")
    assert view(browser) == whole


def test_two_fingers_zoom(browser):
    stage = find(browser, "#stage")
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", stage)
    box = browser.execute_script("return arguments[0].getBoundingClientRect().toJSON()", stage)
    x, y = box["left"] + 500, box["top"] + 350

    def touch(kind, *places):
        points = [dict(x=px, y=py, id=i) for i, (px, py) in enumerate(places)]
        browser.execute_cdp_cmd("Input.dispatchTouchEvent", dict(type=kind, touchPoints=points))
    before = view(browser)
    touch("touchStart", (x - 20, y), (x + 20, y))
    for k in (30, 40, 60):
        touch("touchMove", (x - k, y), (x + k, y))
    touch("touchEnd")
    after = view(browser)
    assert after[0] == pytest.approx(before[0] * 3, rel=0.1)
    assert (500 - after[1]) / after[0] == pytest.approx((500 - before[1]) / before[0], abs=12)


def test_swap_overlay_crops_and_the_next_picture(browser):
    from selenium.webdriver import ActionChains
    loaded(browser)
    stage = find(browser, "#stage")
    browser.execute_script("arguments[0].focus()", stage)
    ActionChains(browser).key_down("f").perform()
    assert stage_colors(browser) == [COLORS["ours"], COLORS["bicubic"]]
    assert [t.text for t in browser.find_elements("css selector", ".tag")] == ["ours", "bicubic"]
    ActionChains(browser).key_up("f").perform()
    assert stage_colors(browser) == [COLORS["bicubic"], COLORS["ours"]]

    find(browser, "#heat").click()
    loaded(browser)
    over = browser.find_elements("css selector", ".over")
    assert [o.get_attribute("alt") for o in over] == ["difference"] * 2
    assert find(browser, "#legend").is_displayed()
    assert all(o.rect == f.rect for o, f in zip(over, browser.find_elements("css selector", ".full")))
    assert stage_colors(browser)[0] not in COLORS.values()
    find(browser, "#heat").click()
    assert browser.find_elements("css selector", ".over") == [] and not find(browser, "#legend").is_displayed()

    crops = browser.find_elements("css selector", ".region:first-child .crop")
    assert len(crops) == 3 and [crop.text for crop in crops] == ["bicubic", "ours", "HR"]
    crops[2].click()
    loaded(browser)
    assert find(browser, "#right").get_property("value") == "HR" and browser.switch_to.active_element == stage
    scale, left, top = view(browser)        # the white square, 100..150 by 250..300, is on the stage
    assert scale >= 2 and 0 < 100 * scale + left < 150 * scale + left < stage.size["width"]
    assert 0 < 250 * scale + top < 300 * scale + top < stage.size["height"]

    stage.send_keys("n")
    loaded(browser)
    full = browser.find_elements("css selector", ".full")
    assert [image.get_attribute("src")[-11:] for image in full] == ["0002-0.webp", "0002-2.webp"]
    assert find(browser, "#right").get_property("value") == "HR"
    assert find(browser, "#size").text.startswith("2 of 3")
    assert find(browser, "tr.current a").text == EVIL[1]
    find(browser, ".each a[href='#3']").click()
    wait(browser, "document.getElementById('size').textContent.startsWith('3 of 3')")


def test_buttons(browser):
    loaded(browser)
    whole = view(browser)
    for button, factor in (("#zoom-in", 1.25), ("#zoom-out", 1 / 1.25)):
        find(browser, button).click()
        assert view(browser)[0] == pytest.approx(whole[0] * factor, rel=1e-3)
        find(browser, "#fit").click()
        assert view(browser) == whole
    find(browser, "#actual").click()
    assert view(browser)[0] == 1
    for button, number in (("#next", 2), ("#next", 3), ("#previous", 2)):
        find(browser, button).click()
        wait(browser, f"document.getElementById('size').textContent.startsWith('{number} of 3')")


def test_a_click_on_a_head_sorts(browser):
    from selenium.webdriver import Keys

    def order():
        return browser.execute_script("return [...document.querySelectorAll('.each:not([hidden]) tbody a')]"
                                      ".map(a => Number(a.hash.slice(1)))")
    head = browser.find_elements("css selector", ".each:not([hidden]) thead th")[2]
    assert order() == [1, 2, 3] and head.get_attribute("aria-sort") is None
    head.find_element("css selector", "button").click()
    assert order() == [1, 3, 2] and head.get_attribute("aria-sort") == "descending"     # 31, 9.5, missing
    head.find_element("css selector", "button").send_keys(Keys.ENTER)
    assert order() == [3, 1, 2] and head.get_attribute("aria-sort") == "ascending"
    first = find(browser, ".each:not([hidden]) thead th button")
    first.click()
    first.click()       # ascending
    assert order() == [2, 1, 3] and head.get_attribute("aria-sort") is None
    find(browser, "#metric").send_keys("NIQE")
    parts = browser.find_elements("css selector", ".each")
    assert [part.is_displayed() for part in parts] == [False, True, False]


@pytest.mark.parametrize("width", [360, 1400])
def test_no_sideways_scrolling(browser, width):
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride",
                            dict(width=width, height=740, deviceScaleFactor=2, mobile=width < 700))
    loaded(browser)
    inner, whole = browser.execute_script("return [innerWidth, document.documentElement.scrollWidth]")
    assert inner == width and whole <= width
    assert find(browser, "#stage").size["width"] > 0.85 * width
    assert view(browser)[0] > 0 and stage_colors(browser) == [COLORS["bicubic"], COLORS["ours"]]
    assert Image.open(io.BytesIO(browser.get_screenshot_as_png())).size == (2 * width, 1480)


def test_no_network_and_no_fetch():
    template = report.TEMPLATE.read_text(encoding="utf-8")
    assert not re.search(r"https?:|//[a-z]|fetch\(|XMLHttp|@import", template)
