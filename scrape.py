"""scrape.py: download original pictures from Konachan, Yande.re or Danbooru into a folder with a manifest.

    python scrape.py konachan --tags landscape --max 300 --contact me@example.org -o wallpapers

Run the same command again to resume. The scraper is slow on purpose: it sends at most one request a second,
waits longer when the board asks for it, and stops at a challenge page. The pictures belong to their artists.
Read the board's terms before you train on pictures or publish them, and skip artists who object (--opt-out).

Needs only Python's standard library.
"""
import argparse
import collections
import csv
import email.utils
import hashlib
import http.client
import ipaddress
import json
import os
import re
import socket
import sys
import urllib.error
import urllib.request
from pathlib import Path, PurePosixPath
from time import monotonic, sleep, time
from urllib.parse import quote, urlencode, urljoin, urlsplit

BOARDS = {"konachan": "https://konachan.com", "yandere": "https://yande.re",
          "danbooru": "https://danbooru.donmai.us"}
FIELDS = {  # for each board software: column of the manifest -> required JSON field of a post
    "moebooru": {"id": "id", "url": "file_url", "md5": "md5", "width": "width", "height": "height",
                 "rating": "rating", "tags": "tags"},
    "danbooru": {"id": "id", "url": "file_url", "md5": "md5", "width": "image_width",
                 "height": "image_height", "rating": "rating", "tags": "tag_string"}}
VALID = {   # column -> regular expression for the value of its field, as JSON text
    "id": "[0-9]+", "url": '".+"', "md5": '"[0-9a-f]{32}"', "width": "[0-9]+", "height": "[0-9]+",
    "rating": '"[gsqe]"', "tags": '".*"'}
RATINGS = {  # for each board software: its rating letter -> (letter of --rating, word in the manifest)
    "moebooru": {"s": ("s", "safe"), "q": ("q", "questionable"), "e": ("e", "explicit")},
    "danbooru": {"g": ("s", "general"), "s": ("q", "sensitive"), "q": ("q", "questionable"),
                 "e": ("e", "explicit")}}
COLUMNS = [     # of manifest.csv; size in bytes, width and height in pixels
    "id", "board", "page", "url", "md5", "size", "width", "height", "rating", "tags", "artists", "source",
    "licence", "file"]
SUFFIXES = {"jpg", "jpeg", "png", "webp", "avif"}
POSTS_PER_PAGE = 100
MAX_FILE_BYTES = 512 << 20
TIMEOUT = 30            # seconds without data before a request counts as failed
MAX_TRIES = 6           # of one request
MAX_WAIT = 900          # seconds; the run stops if a board asks for a longer wait
LOG_INTERVAL = 30       # seconds between status lines, except on a terminal
MAX_NO_ANSWER = 3       # the run stops after so many pictures in a row without an answer


class ScrapeError(ValueError):
    """The run cannot continue. The message tells the user why."""


class RequestError(ScrapeError):
    """One URL cannot be downloaded."""


class NoAnswerError(RequestError):
    """One URL gave no answer, or a temporary error, in every try."""


class PostError(ScrapeError):
    """A post cannot be read, or it does not match the query."""


def clean(text):
    """Convert text from a board to one printable line of at most 20,000 characters (csv has a limit)."""
    return " ".join("".join(c if c.isprintable() else " " for c in str(text)[:20000]).split())


def format_time(seconds):
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def report(text, end="\n"):
    """Print a line to stderr. On a terminal, the next line replaces a line with end=""."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end=end, file=sys.stderr, flush=True)
    elif text:
        print(text, file=sys.stderr, flush=True)


# ------------------------------------------------------------------------------------------------------------
# Requests
# ------------------------------------------------------------------------------------------------------------


def retry_after(value):
    """Convert a Retry-After header (seconds or a date, RFC 9110 section 10.2.3) to seconds from now, or 0."""
    if re.fullmatch(r"\s*[0-9]{1,9}\s*", value or ""):
        return int(value)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time())
    except (ValueError, TypeError):
        return 0


def board_message(body):
    """Return the message in a response body: "message" (Danbooru), "reason" (Moebooru) or the text itself."""
    text = body[:1000].decode("utf-8", "replace")
    try:
        data = json.loads(body)
        text = data.get("message") or data.get("reason") or text
    except (ValueError, AttributeError):    # not JSON, or not an object
        pass
    return clean(text)[:200]


def check_challenge(status, headers, body):
    """Raise ScrapeError for a challenge or login page, and if Cloudflare blocks this client."""
    markup = body[:1000].lstrip().startswith(b"<")
    html = markup or "html" in headers.get("Content-Type", "").lower()
    blocked = status == 403 and (html or body.startswith(b"error code:"))
    cloudflare_503 = status == 503 and html and "cloudflare" in headers.get("Server", "").lower()
    if headers.get("cf-mitigated") or blocked or cloudflare_503 or (status == 200 and markup):
        raise ScrapeError(f"the board sent a web page (status {status}), probably a challenge or login page; "
                          "open the board in a browser, and run the command again later")


class Client(urllib.request.HTTPRedirectHandler):
    """HTTP client that sends one request at a time and waits `pause` seconds after each answer.

    base: address of the board. contact: mail or web address for the User-Agent header.
    private: whether `base` may be a private address. Other private addresses are always refused.
    """

    def __init__(self, base, contact, pause, private=False):
        self.base = urlsplit(base)
        self.pause = pause
        self.private = private
        self.next_request = 0.0     # earliest time of the next request, on the clock of monotonic()
        self.headers = {"User-Agent": f"kabegami-scrape/1 (contact: {contact})", "Accept": "*/*"}
        self.opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), self)

    def check_address(self, url):
        """Raise RequestError for a private address, and for http where the board uses https."""
        try:
            parts = urlsplit(url)
            if parts.scheme not in ("https", self.base.scheme) or not parts.hostname:
                raise RequestError(f"not a usable {self.base.scheme} address: {clean(url)[:200]}")
            if self.private and parts.netloc == self.base.netloc:
                return
            hosts = socket.getaddrinfo(parts.hostname, parts.port, type=socket.SOCK_STREAM)
        except UnicodeError:
            raise RequestError(f"not a host name: {clean(url)[:200]}") from None
        for *_, (ip, *_) in hosts:
            if not ipaddress.ip_address(ip).is_global:
                raise RequestError(f"{clean(url)[:200]} leads to the private address {ip}")

    def redirect_request(self, request, response, code, message, headers, url):
        """Check and delay a redirect like any other request. urllib calls this method."""
        self.check_address(url)
        sleep(self.pause)
        return super().redirect_request(request, response, code, message, headers, url)

    def get(self, url, limit):
        """Download `url` and return its bytes. After a temporary error, wait and try again.

        Raises NoAnswerError after MAX_TRIES tries; RequestError for other errors, such as status 404 or more
        than `limit` bytes; ScrapeError if the board does not want more requests.
        """
        for attempt in range(1, MAX_TRIES + 1):
            sleep(max(0.0, self.next_request - monotonic()))
            status, requested_wait = None, 0
            try:
                self.check_address(url)
                request = urllib.request.Request(url, headers=self.headers)
                with self.opener.open(request, timeout=TIMEOUT) as response:
                    return self.read_body(response, limit)
            except urllib.error.HTTPError as error:
                status, requested_wait = error.code, retry_after(error.headers.get("Retry-After"))
                reason = self.read_error(error)
            except (OSError, http.client.HTTPException) as error:
                reason = clean(error)[:200] or type(error).__name__
            finally:
                self.next_request = monotonic() + self.pause
            if requested_wait > MAX_WAIT:
                raise ScrapeError(f"{reason}; run the command again in {format_time(requested_wait)} minutes")
            wait = max(requested_wait, min(MAX_WAIT, self.pause * 2 ** attempt))
            self.next_request = monotonic() + wait
            if attempt < MAX_TRIES:
                report(f"{reason}; waiting {wait:.3g} s")
        if status in (421, 429):
            raise ScrapeError(f"{reason}, {MAX_TRIES} times; run the command again in an hour")
        raise NoAnswerError(f"{reason}, {MAX_TRIES} times")

    def read_body(self, response, limit):
        """Read a response in pieces, so that memory holds little more than `limit` bytes."""
        body = bytearray()
        while piece := response.read(1 << 16):
            body += piece
            if len(body) > limit:
                raise RequestError(f"the file is longer than the expected {limit} bytes")
        if response.length:
            raise ConnectionError(f"connection closed {response.length} bytes too early")
        check_challenge(200, response.headers, body)
        return bytes(body)

    def read_error(self, error):
        """Return the reason of a temporary error. Raise RequestError or ScrapeError for other errors."""
        with error:
            body = error.read(4096)
        check_challenge(error.code, error.headers, body)
        html = body.lstrip()[:1] == b"<"
        reason = f"{error.code} {clean(error.reason) if html or not body else board_message(body)}"
        if error.code in (421, 429) or error.code >= 500:   # 421 is Moebooru's "user throttled"
            return reason
        raise RequestError(reason)


# ------------------------------------------------------------------------------------------------------------
# Search. `settings` is the result of prepare()
# ------------------------------------------------------------------------------------------------------------


def board_filters(kind, ratings, min_width):
    """Return the tags that select these rating letters and widths on the board's side."""
    excluded = sorted(RATINGS[kind].keys() - ratings)
    tags = []
    if kind == "danbooru" and excluded:
        tags.append("rating:" + ",".join(sorted(ratings)))
    elif len(excluded) == 2:
        tags.append(f"rating:{min(ratings)}")
    elif excluded:      # Moebooru cannot list two ratings, but it can exclude one
        tags.append(f"-rating:{excluded[0]}")
    if min_width:
        tags.append(f"width:>={min_width}")
    return tags


def page_url(settings, number, below_id):
    """Return the URL of a page of the search: the newest posts with an id below `below_id`.

    below_id None: page `number` of all posts.
    """
    tags, page = settings.tags + settings.filters, number
    if below_id is not None:
        if settings.kind == "danbooru":
            page = f"b{below_id}"
        else:
            tags, page = [*tags, f"id:<{below_id}"], 1
    query = {"tags": " ".join(tags), "limit": POSTS_PER_PAGE, "page": page}
    if settings.kind == "danbooru":
        return f"{settings.base}/posts.json?{urlencode(query)}"
    return f"{settings.base}/post.json?{urlencode({**query, 'api_version': 2, 'include_tags': 1})}"


def read_page(client, url):
    """Request a page of the search. Return (posts, {tag: type of tag}); Danbooru sends no types.

    Raises ScrapeError if the answer is not a list of posts.
    """
    body = client.get(url, MAX_FILE_BYTES)
    posts, types = None, {}
    try:
        posts = json.loads(body)
    except ValueError:
        pass
    if isinstance(posts, dict):
        types = posts.get("tags")
        posts = None if posts.get("success") is False else posts.get("posts")
    if not isinstance(posts, list):
        raise ScrapeError(f'expected a list of posts, received "{board_message(body)}"')
    return posts, types if isinstance(types, dict) else {}


def read_post(raw, types, settings):
    """Convert a post, as parsed from JSON, to a row of the manifest. The size is 0 if the post has none.

    Raises PostError if a required field is missing or invalid, or if the post does not match the query.
    """
    if not isinstance(raw, dict):
        raise PostError(f"a post is {clean(json.dumps(raw))[:200]}")
    row = {}
    for column, field in FIELDS[settings.kind].items():
        row[column] = raw.get(field)
        if row[column] is None:
            raise PostError(f'"{field}" is missing; the fields are {clean(", ".join(raw))[:500]}')
        if not re.fullmatch(VALID[column], json.dumps(row[column])):
            raise PostError(f'"{field}" is {clean(json.dumps(row[column]))[:200]}')
    if row["rating"] not in settings.ratings or row["width"] < settings.min_width:
        raise PostError(f'a post with rating {row["rating"]} and width {row["width"]} was not requested')
    try:
        url = quote(urljoin(f"{settings.base}/", clean(row["url"])), ":/?#[]@!$&'()*+,;=%~")
        suffix = PurePosixPath(urlsplit(url).path).suffix[1:].lower()
    except ValueError:      # urllib refuses addresses such as http://[x/
        raise PostError(f'"file_url" is {clean(row["url"])[:200]}') from None
    artists = str(raw.get("tag_string_artist") or "").split()
    artists += [tag for tag in row["tags"].split() if types.get(tag) in ("artist", "circle")]
    page = "posts" if settings.kind == "danbooru" else "post/show"
    return {
        **row,
        "board": settings.name,
        "page": f"{settings.base}/{page}/{row['id']}",
        "url": url,
        "size": raw["file_size"] if type(raw.get("file_size")) is int else 0,
        "rating": RATINGS[settings.kind][row["rating"]][1],
        "tags": clean(row["tags"]),
        "artists": clean(" ".join(artists)),
        "source": clean(raw.get("source") or ""),
        "licence": clean(raw.get("license") or raw.get("licence") or ""),
        "file": f"{settings.name}-{row['id']}-{row['md5'][:8]}.{clean(suffix)}"}


def skip_reason(raw, row, settings):
    """Return why the user does not want a post, or None if it is wanted."""
    tags = f"{row['tags']} {row['artists']}".lower().split()
    if settings.opted_out.intersection(tags) or raw.get("is_banned"):
        return "opted out or taken down"
    if not settings.variants and (raw.get("parent_id") or raw.get("has_children")):
        return "variant of another post"
    if row["file"].rpartition(".")[2] not in SUFFIXES:
        return "not a picture"
    if row["size"] > MAX_FILE_BYTES:
        return "file too large"
    return None


def search(client, settings, skipped):
    """Yield a manifest row for each wanted post, until the board sends an empty page.

    A page is requested when its rows are needed. If it fails, the pictures of earlier pages are already
    stored. Adds the reason for each skipped post to the Counter `skipped`.

    Pages are requested by id, because boards refuse high page numbers and numbered pages shift when somebody
    uploads. Page numbers are used if the search has its own order, or if the board ignores the id.

    Raises ScrapeError if a page fails. Also raises it if the first page, or two pages in a row, have no
    usable post: then the board has probably changed its answers.
    """
    by_id = not any(tag.startswith(("order:", "id:")) for tag in settings.tags)
    number, below_id, seen, useless_pages = 1, None, set(), 0
    while True:
        try:
            posts, types = read_page(client, page_url(settings, number, below_id))
        except ScrapeError as error:
            raise ScrapeError(f"page {number} of {settings.base}: {error}") from None
        if not posts:
            return
        useless_pages += 1
        problem = "all posts are repeated"
        for raw in posts:
            try:
                row = read_post(raw, types, settings)
            except PostError as error:
                problem = error
                skipped["unreadable or not requested"] += 1
                continue
            if row["id"] in seen:
                continue
            seen.add(row["id"])
            useless_pages = 0
            reason = skip_reason(raw, row, settings)
            if reason is None:
                yield row
            else:
                skipped[reason] += 1
        if useless_pages == 2 or not seen:
            raise ScrapeError(f"page {number} of {settings.base} has no usable post: {problem}")
        if useless_pages and by_id:
            by_id = False
        else:
            number += 1
        below_id = min(seen) if by_id else None


# ------------------------------------------------------------------------------------------------------------
# The folder: pictures and manifest.csv
# ------------------------------------------------------------------------------------------------------------


def read_manifest(path):
    """Return the rows of the manifest, or [] if there is none. Cut off an incomplete last line.

    Raises ScrapeError if the file is not a manifest.
    """
    data = path.read_bytes() if path.exists() else b""
    if not data:
        return []
    end = data.rfind(b"\n") + 1     # clean() keeps line breaks out of the fields
    lines = list(csv.reader(data[:end].decode("utf-8-sig", "replace").splitlines()))
    if lines[:1] != [COLUMNS]:
        raise ScrapeError(f"{path} is not a manifest of scrape.py; choose another folder")
    if end < len(data):             # a run was killed while it added a row
        os.truncate(path, end)
    return [dict(zip(COLUMNS, line)) for line in lines[1:] if len(line) == len(COLUMNS)]


def add_row(path, row):
    is_new = not path.exists() or path.stat().st_size == 0
    with open(path, "a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if is_new:
            writer.writeheader()
        writer.writerow(row)


def fetch(client, row, folder, listed):
    """Download a picture into the folder and add its row to the manifest. Return the bytes received.

    A file that a killed run left without a row is not downloaded again. listed: file names in the manifest.
    Raises RequestError if the picture cannot be downloaded, ScrapeError if it cannot be written.
    """
    target = folder / row["file"]
    exists = target.exists()
    body = target.read_bytes() if exists else client.get(row["url"], row["size"] or MAX_FILE_BYTES)
    md5 = hashlib.md5(body, usedforsecurity=False).hexdigest()
    if md5 != row["md5"]:
        where = "the file in the folder" if exists else f"the download of {len(body)} bytes"
        raise RequestError(f"wrong md5 of {where}: {md5} instead of {row['md5']}")
    try:
        if not exists:
            part = folder / f"{target.name}.part"
            part.write_bytes(body)
            os.replace(part, target)
        if target.name not in listed:
            add_row(folder / "manifest.csv", {**row, "size": len(body)})
    except OSError as error:
        raise ScrapeError(f"cannot write {target}: {error.strerror}") from None
    return 0 if exists else len(body)


# ------------------------------------------------------------------------------------------------------------
# The command
# ------------------------------------------------------------------------------------------------------------


def fetch_all(client, settings, totals, skipped):
    """Search the board and download the wanted pictures that are not in the folder.

    Adds to the Counter `totals`: found, present, fetched, failed, bytes. With --dry-run, downloads nothing.
    """
    manifest = read_manifest(settings.out / "manifest.csv")
    listed = {row["file"] for row in manifest}
    present = {row["md5"] for row in manifest if (settings.out / row["file"]).is_file()}
    found, no_answer, start = set(), 0, monotonic()
    last_status = start
    for row in search(client, settings, skipped):
        if row["md5"] in found:     # two posts with the same picture
            continue
        found.add(row["md5"])
        totals["found"] += 1
        try:
            if row["md5"] in present:
                totals["present"] += 1
            else:
                size = row["size"] if settings.dry_run else fetch(client, row, settings.out, listed)
                totals["bytes"] += size
                totals["fetched"] += 1
                no_answer = 0
        except RequestError as error:
            report(f"failed: {row['file']}: {error}")
            totals["failed"] += 1
            no_answer = no_answer + 1 if isinstance(error, NoAnswerError) else 0
        if no_answer == MAX_NO_ANSWER:
            raise ScrapeError(f"no answer for {MAX_NO_ANSWER} pictures in a row; run the command again later")
        if totals["found"] >= settings.max:
            return
        if not sys.stderr.isatty() and monotonic() - last_status < LOG_INTERVAL:
            continue
        last_status = monotonic()
        seconds = max(last_status - start, 0.001)
        left = (settings.max - totals["found"]) * seconds / totals["found"]
        report(f"{totals['found']} of at most {settings.max} pictures  "
               f"{totals['bytes'] / 1e6 / seconds:.2f} MB/s  at most {format_time(left)} left", end="")


def summary(settings, totals, skipped):
    """Describe a run in one line."""
    action = "to fetch" if settings.dry_run else "fetched"
    text = (f"{totals['fetched']} pictures {action} ({totals['bytes'] / 1e6:.1f} MB), "
            f"{totals['failed']} failed, {totals['present']} already in {settings.out}")
    reasons = [f"{count} {reason}" for reason, count in skipped.most_common()]
    return text + (f"; skipped posts: {', '.join(reasons)}" if reasons else "")


def parse():
    p = argparse.ArgumentParser(
        description="Download original pictures from an image board, slowly, with a manifest of the sources.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="""example:
  python scrape.py konachan --tags landscape --max 300 --contact me@example.org -o wallpapers
Run the same command again to resume. Pictures in the folder are not downloaded again.

Rating s is 'safe' on Konachan and Yande.re, and 'general' on Danbooru; q is 'questionable', and
also 'sensitive' on Danbooru; e is 'explicit'. Without an account, Danbooru accepts two tags.

The pictures belong to their artists. Respect them, and read the board's terms before you train
on pictures or publish them.

exit code: 0 done, 1 some pictures failed, 2 the run could not continue, 130 Ctrl-C""")
    p.add_argument("board", choices=BOARDS, help="the board; with --url, the kind of board")
    p.add_argument("--tags", nargs="+", default=[], metavar="TAG",
                   help='search tags as on the board, in quotes: "landscape -chibi" (default: all posts)')
    p.add_argument("-o", "--out", type=Path, required=True, help="folder for the pictures and manifest.csv")
    p.add_argument("--contact", required=True, help="your mail or web address, sent to the board")
    p.add_argument("--max", type=int, default=300,
                   help="number of pictures, including those already in the folder (default: 300)")
    p.add_argument("--min-width", type=int, default=3840, help="smallest width in pixels (default: 3840)")
    p.add_argument("--rating", default="s", help="one or more of the letters s, q, e (default: s)")
    p.add_argument("--variants", action="store_true", help="include parents and children of other posts")
    p.add_argument("--opt-out", type=Path, metavar="FILE", help="list of artists or other tags to skip")
    p.add_argument("--dry-run", action="store_true", help="search and count, download nothing")
    p.add_argument("--pause", type=float, default=1.0, help="seconds between requests (default: 1)")
    p.add_argument("--url", help="address of another board; on localhost, --pause may be below 1")
    p.add_argument("--resume", action="store_true", help=argparse.SUPPRESS)     # every run resumes
    return p.parse_args()


def prepare(args):
    """Check the arguments; add base, kind, name, filters, ratings and opted_out. Raises ScrapeError."""
    args.base = (args.url or BOARDS[args.board]).rstrip("/")
    args.kind = "danbooru" if args.board == "danbooru" else "moebooru"
    address = urlsplit(args.base)
    local = args.url and address.hostname in ("localhost", "127.0.0.1", "::1")
    if not (args.pause >= 1 or local and args.pause >= 0):
        raise ScrapeError(f"--pause {args.pause:g} is too short; use 1 or more")
    if not re.fullmatch(r"[ -~]*(\w@\w|https?://\w)[ -~]*", args.contact, re.ASCII):
        raise ScrapeError(f"--contact {clean(args.contact)} is not a mail or web address in ASCII")
    if not re.fullmatch("[sqe]+", args.rating):
        raise ScrapeError(f"--rating {args.rating} is unknown; use one or more of the letters s, q, e")
    try:
        lines = args.opt_out.read_text("utf-8-sig").splitlines() if args.opt_out else []
        if not args.dry_run:
            args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ScrapeError(f"cannot use {error.filename}: {error.strerror}") from None
    args.opted_out = {"_".join(line.lower().split()) for line in lines if line.strip()}
    args.ratings = {letter for letter, (option, _) in RATINGS[args.kind].items() if option in args.rating}
    args.tags = " ".join(args.tags).split()
    args.filters = board_filters(args.kind, args.ratings, args.min_width)
    args.name = re.sub("[^a-z0-9.]+", "-", address.netloc.lower() if args.url else args.board).strip("-.")
    return args


def main():
    args, totals, skipped = parse(), collections.Counter(), collections.Counter()
    try:
        settings = prepare(args)
        client = Client(settings.base, settings.contact, settings.pause, private=bool(settings.url))
        try:
            fetch_all(client, settings, totals, skipped)
        finally:    # after an error and after Ctrl-C, too
            report("", end="")
            print(summary(settings, totals, skipped), flush=True)
    except ScrapeError as error:
        report(f"error: {error}")
        sys.exit(2)
    except KeyboardInterrupt:
        report("stopped; run the same command again to resume")
        sys.exit(130)
    sys.exit(1 if totals["failed"] else 0)


if __name__ == "__main__":
    main()
