"""Download original pictures from Konachan, Yande.re, or Danbooru into a folder with a manifest.

    python scrape.py konachan --tags landscape --max 300 --contact me@example.org -o wallpapers

Run the same command again to resume. Pictures in manifest.csv are not downloaded again. The scraper sends at
most one request per second, waits longer if the board asks for it, and stops at a challenge page. On
Danbooru, more than two tags need an account. Posts with a parent or children are variants: they are skipped.

The pictures belong to their artists. Read the terms of the board before you train on pictures or publish
them, and skip artists who object (--opt-out).

Exit code: 0 done, 1 some pictures failed, 2 the run could not continue, 130 Ctrl-C.
Needs only Python's standard library.
"""
import argparse
import collections
import csv
import hashlib
import http.client
import json
import os
import re
import sys
import urllib.error
import urllib.request
from pathlib import Path
from time import monotonic, sleep
from urllib.parse import quote, urlencode, urljoin, urlsplit

BOARDS = {"konachan": "https://konachan.com", "yandere": "https://yande.re",
          "danbooru": "https://danbooru.donmai.us"}
FIELDS = {  # for each board software: column of the manifest -> required JSON field of a post
    "moebooru": {"id": "id", "url": "file_url", "md5": "md5", "width": "width", "height": "height",
                 "rating": "rating", "tags": "tags"},
    "danbooru": {"id": "id", "url": "file_url", "md5": "md5", "width": "image_width",
                 "height": "image_height", "rating": "rating", "tags": "tag_string"}}
NUMBERS = {"id", "width", "height"}     # columns with an integer; the other fields are text
RATINGS = {     # for each board software: its rating letter -> word in the manifest
    "moebooru": {"s": "safe", "q": "questionable", "e": "explicit"},
    "danbooru": {"g": "general", "s": "sensitive", "q": "questionable", "e": "explicit"}}
DANBOORU_LETTERS = {"s": "g", "q": "s,q", "e": "e"}     # letter of --rating -> Danbooru's letters
COLUMNS = [     # of manifest.csv; size in bytes, width and height in pixels
    "id", "board", "page", "url", "md5", "size", "width", "height", "rating", "tags", "artists", "source",
    "licence", "file"]
SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".avif"}
POSTS_PER_PAGE = 100
PAUSE = 1.0             # seconds before each request
TIMEOUT = 30            # seconds without data before a request counts as failed
MAX_TRIES = 6           # of one request
MAX_WAIT = 900          # seconds; the run stops if a board asks for a longer wait
MAX_FAILURES = 5        # the run stops after so many failed pictures in a row


class ScrapeError(ValueError):
    """The run cannot continue. The message tells the user why."""


class RequestError(ScrapeError):
    """One URL cannot be downloaded. If it is a picture, the run continues with the next one."""


def clean(text):
    """Convert text from a board to one printable line of at most 20,000 characters (csv has a limit)."""
    return " ".join("".join(c if c.isprintable() else " " for c in str(text)[:20000]).split())


def report(text, end="\n"):
    """Print a line to stderr. On a terminal, the next line replaces a line with end=""."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end=end, file=sys.stderr, flush=True)
    elif text:
        print(text, file=sys.stderr, flush=True)


# ---- requests

class Client(urllib.request.HTTPRedirectHandler):
    """HTTP client that waits PAUSE seconds before each request."""

    def __init__(self, contact):
        self.headers = {"User-Agent": f"kabegami-scrape/1 (contact: {contact})", "Accept": "*/*"}
        self.opener = urllib.request.build_opener(self)

    def redirect_request(self, *args):
        """Delay a redirect like any other request. urllib calls this method."""
        sleep(PAUSE)
        return super().redirect_request(*args)

    def get(self, url):
        """Download `url` and return its bytes. After a temporary error, wait and try again.

        Raises RequestError after MAX_TRIES tries, and for other errors such as status 404.
        Raises ScrapeError if the board does not want more requests.
        """
        if urlsplit(url).scheme not in ("http", "https"):       # urllib would open file:///etc/passwd, too
            raise RequestError(f"not a web address: {clean(url)[:200]}")
        wait = PAUSE
        for attempt in range(1, MAX_TRIES + 1):
            sleep(wait)
            status, wait = None, PAUSE * 2 ** attempt
            try:
                status, headers, body = self.send(url)
                if status == 200:
                    return body
                reason = f"status {status}: {clean(body.decode('utf-8', 'replace'))[:200]}"
                if status not in (421, 429) and status < 500:       # 421 is Moebooru's "user throttled"
                    raise RequestError(reason)
                seconds = headers.get("Retry-After", "")
                wait = max(wait, int(seconds) if seconds.isdecimal() else 0)
            except (OSError, http.client.HTTPException) as error:
                reason = clean(error)[:200] or type(error).__name__
            if wait > MAX_WAIT:
                raise ScrapeError(f"{reason}; run the command again in {wait / 60:.0f} minutes")
            if attempt < MAX_TRIES:
                report(f"{reason}; waiting {wait:.3g} s")
        if status in (421, 429):
            raise ScrapeError(f"{reason}, {MAX_TRIES} times; run the command again in an hour")
        raise RequestError(f"{reason}, {MAX_TRIES} times")

    def send(self, url):
        """Send one request. Return (status, headers, body). Raises ScrapeError for a challenge page."""
        try:
            response = self.opener.open(urllib.request.Request(url, headers=self.headers), timeout=TIMEOUT)
        except urllib.error.HTTPError as error:
            response = error
        with response:
            status, headers, body = response.status, response.headers, response.read()
        is_page = status in (200, 403) and body[:1000].lstrip().startswith(b"<")
        if is_page or headers.get("cf-mitigated"):      # the header is Cloudflare's
            raise ScrapeError(f"the board sent a web page (status {status}), probably a challenge or login "
                              "page; open the board in a browser, and run the command again later")
        return status, headers, body


# ---- search; `settings` is the result of parse()

def page_url(settings, number, below_id):
    """Return the URL of page `number` of the posts with an id below `below_id` (None: of all posts)."""
    tags = [*settings.tags, f"rating:{settings.letters}"]
    if settings.min_width:
        tags.append(f"width:>={settings.min_width}")
    if below_id and settings.kind == "moebooru":
        tags.append(f"id:<{below_id}")
    query = {"tags": " ".join(tags), "limit": POSTS_PER_PAGE, "page": number}
    if settings.kind == "moebooru":
        query |= {"api_version": 2, "include_tags": 1}      # with the type of each tag
        return f"{settings.base}/post.json?{urlencode(query)}"
    if below_id:
        query["page"] = f"b{below_id}"
    return f"{settings.base}/posts.json?{urlencode(query)}"


def read_page(client, url):
    """Request a page of the search. Return (posts, {tag: type of tag}); Danbooru sends no types.

    Raises ScrapeError if the answer is not a list of posts.
    """
    body = client.get(url)
    try:
        answer = json.loads(body)
        return (answer, {}) if isinstance(answer, list) else (answer["posts"], answer["tags"])
    except (ValueError, KeyError, TypeError):
        text = clean(body.decode("utf-8", "replace"))[:200]
        raise ScrapeError(f"expected a list of posts, received {text!r}") from None


def read_post(raw, types, settings):
    """Convert a post, as parsed from JSON, to a row of the manifest without a size.

    Raises ScrapeError if a required field is missing or invalid, or if the post does not match the query.
    """
    if not isinstance(raw, dict):
        raise ScrapeError(f"a post is {clean(json.dumps(raw))[:200]}")
    row = {}
    for column, field in FIELDS[settings.kind].items():
        row[column] = raw.get(field)
        if type(row[column]) is not (int if column in NUMBERS else str):
            value = clean(json.dumps(row[column]))[:200]
            raise ScrapeError(f'"{field}" is {value}; the fields are {clean(", ".join(raw))[:500]}')
    if not re.fullmatch("[0-9a-f]{32}", row["md5"]):    # a part of it becomes the file name
        raise ScrapeError(f'"md5" is {row["md5"][:40]!r}')
    if row["rating"] not in settings.letters.split(",") or row["width"] < settings.min_width:
        raise ScrapeError(f'rating {row["rating"][:20]!r} with width {row["width"]} was not requested')
    url = quote(urljoin(f"{settings.base}/", clean(row["url"])), ":/?#[]@!$&'()*+,;=%~")
    suffix = Path(urlsplit(url).path).suffix.lower()
    artists = str(raw.get("tag_string_artist") or "").split()
    artists += [tag for tag in row["tags"].split() if types.get(tag) in ("artist", "circle")]
    page = "posts" if settings.kind == "danbooru" else "post/show"
    return {
        **row,
        "board": settings.name,
        "page": f"{settings.base}/{page}/{row['id']}",
        "url": url,
        "rating": RATINGS[settings.kind][row["rating"]],
        "tags": clean(row["tags"]),
        "artists": clean(" ".join(artists)),
        "source": clean(raw.get("source") or ""),
        "licence": clean(raw.get("license") or raw.get("licence") or ""),
        "file": f"{settings.name}-{row['id']}-{row['md5'][:8]}{suffix}"}


def skip_reason(raw, row, settings):
    """Return why the user does not want a post, or None if it is wanted."""
    tags = f"{row['tags']} {row['artists']}".lower().split()
    if settings.opted_out.intersection(tags) or raw.get("is_banned"):
        return "opted out or taken down"
    if raw.get("parent_id") or raw.get("has_children"):
        return "variant of another post"
    if Path(row["file"]).suffix not in SUFFIXES:
        return "not a picture"
    return None


def search(client, settings, skipped):
    """Yield a manifest row for each wanted post, until the board sends an empty page.

    Adds the reason for each skipped post to the Counter `skipped`. Raises ScrapeError if a page fails, or if
    it has no usable new post: then the board has probably changed its answers.
    """
    # Search by id where possible: boards refuse high page numbers, and each upload shifts numbered pages.
    by_id = not any(tag.startswith(("order:", "id:")) for tag in settings.tags)
    number, below_id, seen = 1, None, set()
    while True:
        posts, types = read_page(client, page_url(settings, number, below_id))
        if not posts:
            return
        seen_before, problem = len(seen), "all posts are repeated"
        for raw in posts:
            try:
                row = read_post(raw, types, settings)
            except ScrapeError as error:
                problem = error
                skipped["unreadable or not requested"] += 1
                continue
            if row["id"] in seen:
                continue
            seen.add(row["id"])
            reason = skip_reason(raw, row, settings)
            if reason is None:
                yield row
            else:
                skipped[reason] += 1
        if len(seen) == seen_before:
            raise ScrapeError(f"a page of {settings.base} has no usable new post: {problem}")
        if by_id:
            below_id = min(p["id"] for p in posts if isinstance(p, dict) and type(p.get("id")) is int)
        else:
            number += 1


# ---- the folder: pictures and manifest.csv

def read_manifest(path):
    """Return the md5 sums in the manifest. Create the file if needed. Cut off an incomplete last line."""
    if not path.exists():
        path.write_text(",".join(COLUMNS) + "\n", encoding="utf-8")
    data = path.read_bytes()
    end = data.rfind(b"\n") + 1     # clean() keeps line breaks out of the fields
    reader = csv.DictReader(data[:end].decode("utf-8-sig", "replace").splitlines())
    if reader.fieldnames != COLUMNS:
        raise ScrapeError(f"{path} is not a manifest of scrape.py; choose another folder")
    if end < len(data):             # a run was killed while it added a row
        os.truncate(path, end)
    return {row["md5"] for row in reader}


def fetch(client, row, folder):
    """Download a picture into the folder, add its row to the manifest, and return its size in bytes.

    The file is written completely or not at all, and the row after the file.
    Raises RequestError if the picture cannot be downloaded, ScrapeError if it cannot be written.
    """
    body = client.get(row["url"])
    md5 = hashlib.md5(body, usedforsecurity=False).hexdigest()
    if md5 != row["md5"]:
        raise RequestError(f"the md5 of {len(body)} bytes is {md5} instead of {row['md5']}")
    target, part = folder / row["file"], folder / f"{row['file']}.part"
    try:
        part.write_bytes(body)
        os.replace(part, target)
        with open(folder / "manifest.csv", "a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, COLUMNS, lineterminator="\n").writerow({**row, "size": len(body)})
    except OSError as error:
        raise ScrapeError(f"cannot write {target}: {error.strerror}") from None
    return len(body)


# ---- the command

def fetch_all(client, settings, totals, skipped):
    """Search the board and download the wanted pictures that are not in the manifest.

    Adds to the Counter `totals`: found, present, fetched, failed, bytes.
    """
    present = read_manifest(settings.out / "manifest.csv")
    failures, start = 0, monotonic()
    for row in search(client, settings, skipped):
        totals["found"] += 1
        try:
            if row["md5"] in present:
                totals["present"] += 1
            else:
                totals["bytes"] += fetch(client, row, settings.out)
                totals["fetched"] += 1
                present.add(row["md5"])
            failures = 0
        except RequestError as error:
            report(f"failed: {row['file']}: {error}")
            totals["failed"] += 1
            failures += 1
        if failures == MAX_FAILURES:
            raise ScrapeError(f"{failures} pictures in a row failed; run the command again later")
        if totals["found"] >= settings.max:
            return
        rate = totals["bytes"] / 1e6 / max(monotonic() - start, 0.001)
        report(f"{totals['found']} of at most {settings.max} pictures  {rate:.2f} MB/s", end="")


def parse():
    """Parse and check the arguments; add opted_out, base, name, kind and letters (of the rating)."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("board", choices=BOARDS, help="the board; with --url, the kind of board")
    p.add_argument("--tags", nargs="+", default=[], metavar="TAG",
                   help='search tags as on the board, in quotes: "landscape -chibi" (default: all posts)')
    p.add_argument("-o", "--out", type=Path, required=True, help="folder for the pictures and manifest.csv")
    p.add_argument("--contact", required=True, help="your mail or web address, sent to the board")
    p.add_argument("--max", type=int, default=300, help="pictures, including earlier runs (default: 300)")
    p.add_argument("--min-width", type=int, default=3840, help="smallest width in pixels (default: 3840)")
    p.add_argument("--rating", choices="sqe", default="s",
                   help="s: safe or general, q: questionable or sensitive, e: explicit (default: s)")
    p.add_argument("--opt-out", type=Path, metavar="FILE", help="list of artists or other tags to skip")
    p.add_argument("--url", help="address of another board")
    args = p.parse_args()
    if not re.fullmatch("[ -~]*(@|https?://)[ -~]*", args.contact):
        p.error(f"--contact {clean(args.contact)} is not a mail or web address in ASCII")
    try:
        lines = args.opt_out.read_text("utf-8-sig").splitlines() if args.opt_out else []
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        p.error(f"cannot use {error.filename}: {error.strerror}")
    args.opted_out = {"_".join(line.lower().split()) for line in lines if line.strip()}
    args.tags = " ".join(args.tags).split()
    args.base = (args.url or BOARDS[args.board]).rstrip("/")
    args.name = urlsplit(args.base).hostname if args.url else args.board
    args.kind = "danbooru" if args.board == "danbooru" else "moebooru"
    args.letters = DANBOORU_LETTERS[args.rating] if args.kind == "danbooru" else args.rating
    return args


def main():
    settings, totals, skipped = parse(), collections.Counter(), collections.Counter()
    code = 0
    try:
        fetch_all(Client(settings.contact), settings, totals, skipped)
    except ScrapeError as error:
        report(f"error: {error}")
        code = 2
    except KeyboardInterrupt:
        report("stopped; run the same command again to resume")
        code = 130
    report("", end="")
    print(f"{totals['fetched']} pictures fetched ({totals['bytes'] / 1e6:.1f} MB), "
          f"{totals['failed']} failed, {totals['present']} already in the manifest of {settings.out}")
    for reason, count in skipped.most_common():
        print(f"{count} posts skipped: {reason}")
    sys.exit(code or int(totals["failed"] > 0))


if __name__ == "__main__":
    main()
