# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""Pictures and videos of requests: data URIs, URLs that must not lead into a private network, and their limits."""

import asyncio
import base64
import ipaddress
import re
import socket
from contextlib import suppress
from typing import Any, BinaryIO

import httpx
from PIL import Image, ImageOps

from ..space.uploads import PICTURES, TooMuchError, open_picture
from .limits import Limits, RequestError


_MOST_REDIRECTS = 5
_CONNECT_SECONDS = 3.0  # for an address of a host that has further ones
_DATA = re.compile(r"data:[\w.+-]+/[\w.+-]+(?:;[\w.=+-]+)*?;base64,", re.IGNORECASE)
# Addresses of IPv6 that a gateway maps to those of IPv4, in the last four bytes.
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
# All public addresses of IPv6 are here, except those of IPv4 in another form.
_GLOBAL = ipaddress.ip_network("2000::/3")
# Tunnels of IPv4 (Teredo, 6to4 and its relays), clouds' services for their own machines, and addresses for examples.
_NOT_PUBLIC = ("2001::/32", "2002::/16", "192.88.99.0/24", "192.0.0.0/24", "168.63.129.16/32", "3fff::/20")
_NOT_PUBLIC = tuple(map(ipaddress.ip_network, _NOT_PUBLIC))
# The bytes before the address of IPv4 in an ISATAP tunnel's.
_ISATAP = (b"\x00\x00\x5e\xfe", b"\x02\x00\x5e\xfe")


def read_picture(data: bytes, limits: Limits, *, param: str | None = None) -> Image.Image:
    """
    Decode a JPEG, PNG or WebP file.

    Args:
        data (`bytes`): The file.
        limits ([`Limits`]): Its `max_frame_bytes` and `max_frame_pixels` are checked before the picture is decoded.
        param (`str`, *optional*): The field that an error names.

    Raises:
        [`RequestError`]: If it is too large, or not a picture.
    """
    if len(data) > limits.max_frame_bytes:
        too_large = (
            f"The picture has {len(data)} bytes, and the limit is {limits.max_frame_bytes}: send a smaller one."
        )
        raise RequestError(too_large, status=413, code="frame_too_large", param=param)
    try:
        with open_picture(data) as picture:
            if picture.width * picture.height > limits.max_frame_pixels:
                raise RequestError(
                    f"The picture has {picture.width} x {picture.height} pixels, and the limit is "
                    f"{limits.max_frame_pixels}: send a smaller one.",
                    status=413,
                    code="frame_too_large",
                    param=param,
                )
            return ImageOps.exif_transpose(picture).convert("RGB")
    except TooMuchError as error:
        raise RequestError(str(error), status=413, code="frame_too_large", param=param) from None
    except RequestError:
        raise
    except Exception:  # Pillow has errors of many kinds for damaged files
        wrong = f"This is not a readable {', '.join(PICTURES[:-1])} or {PICTURES[-1]} picture."
        raise RequestError(wrong, code="invalid_image", param=param) from None


def read_data_uri(uri: str, *, most_bytes: int, param: str | None = None) -> bytes:
    """
    Return the content of a data URI, such as `data:image/jpeg;base64,...`.

    Raises:
        [`RequestError`]: If it is too large, or not a data URI.
    """
    head = _DATA.match(uri)
    if head is None:
        wrong = "A data URI begins with its type, such as data:image/jpeg;base64, and the file follows in base64."
        raise RequestError(wrong, code="invalid_data_uri", param=param)
    body = uri[head.end() :]
    if len(body) > most_bytes * 4 / 3 + 4:
        wrong = f"The file in this data URI has more than {most_bytes} bytes, which is the limit."
        raise RequestError(wrong, status=413, code="file_too_large", param=param)
    try:
        return base64.b64decode(body, validate=True)
    except ValueError:
        raise RequestError("The data URI is not valid base64.", code="invalid_data_uri", param=param) from None


def is_public(address: str) -> bool:
    """Return whether an IP address belongs to the public internet."""
    found = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(found, ipaddress.IPv6Address):
        inner = ipaddress.ip_address(found.packed[-4:])
        if found.ipv4_mapped is not None or found in _NAT64:
            return is_public(str(inner))
        if found not in _GLOBAL or found.packed[8:12] in _ISATAP:
            return False
    is_usual = found.is_global and not found.is_multicast and not found.is_reserved and not found.is_unspecified
    return is_usual and not any(found in network for network in _NOT_PUBLIC if network.version == found.version)


async def _resolve(url: httpx.URL, *, allows_private: bool, param: str | None) -> list[str]:
    """Return the addresses of a URL's host. All must be public unless private ones are allowed."""
    host, port = url.raw_host.decode(), url.port or (443 if url.scheme == "https" else 80)
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        raise RequestError(f"There is no host {host!r}.", code="unreachable_url", param=param) from None
    addresses = list(dict.fromkeys(entry[4][0] for entry in found))
    if not allows_private and not all(map(is_public, addresses)):
        raise RequestError(
            f"{host!r} has a private or loopback address, which this server does not fetch from.",
            status=403,
            code="private_url",
            param=param,
        )
    return addresses


async def fetch(
    url: str,
    file: BinaryIO,
    *,
    most_bytes: int,
    seconds: float,
    allows_private: bool = False,
    param: str | None = None,
) -> None:
    """
    Write what an `http` or `https` URL names into a file.

    Each redirect is checked as the first address is. The connection goes to the address that was checked, so that a
    name cannot resolve to another one in between. Proxies of the environment are not used.

    Args:
        url (`str`): The URL.
        file (`BinaryIO`): Where to write.
        most_bytes (`int`): Largest file.
        seconds (`float`): Time limit for everything.
        allows_private (`bool`, *optional*, defaults to `False`): Whether the host may be in a private network.
        param (`str`, *optional*): The field that an error names.

    Raises:
        [`RequestError`]: If the URL is refused, cannot be fetched, or exceeds a limit.
    """
    options = {"most_bytes": most_bytes, "allows_private": allows_private, "param": param}
    try:
        await asyncio.wait_for(_fetch(url, file, **options), timeout=seconds)
    except (TimeoutError, asyncio.TimeoutError, httpx.TimeoutException):
        wrong = f"The URL took longer than {seconds:g} s, which is the limit."
        raise RequestError(wrong, code="unreachable_url", param=param) from None
    except httpx.HTTPError as error:
        wrong = f"The URL cannot be fetched ({type(error).__name__})."
        raise RequestError(wrong, code="unreachable_url", param=param) from None


async def _fetch(url: str, file: BinaryIO, *, most_bytes: int, allows_private: bool, param: str | None) -> None:
    # A client would follow redirects and unpack answers. A transport does only what is asked.
    async with httpx.AsyncHTTPTransport(trust_env=False) as transport:
        place = _parse(url, param)
        for _ in range(_MOST_REDIRECTS + 1):
            addresses = await _resolve(place, allows_private=allows_private, param=param)
            response = await _ask(transport, place, addresses)
            try:
                if response.has_redirect_location:
                    place = _parse(response.headers["location"], param, base=place)
                    continue
                if response.status_code != 200:
                    wrong = f"The URL answered with status {response.status_code}."
                    raise RequestError(wrong, code="unreachable_url", param=param)
                await _save(response, file, most_bytes, param)
                return
            finally:
                await response.aclose()
    raise RequestError(f"The URL redirects more than {_MOST_REDIRECTS} times.", code="unreachable_url", param=param)


async def _ask(transport: httpx.AsyncHTTPTransport, url: httpx.URL, addresses: list[str]) -> httpx.Response:
    """Return what the first of the addresses answers to which there is a connection."""
    for address in addresses[:-1]:
        with suppress(httpx.ConnectError, httpx.ConnectTimeout):
            return await transport.handle_async_request(_pinned(url, address, timeout={"connect": _CONNECT_SECONDS}))
    return await transport.handle_async_request(_pinned(url, addresses[-1]))


def _parse(url: str, param: str | None, *, base: httpx.URL | None = None) -> httpx.URL:
    """Return a URL, or where a redirect leads, for all who use it: two parsers could see two hosts."""
    try:
        found = httpx.URL(url) if base is None else base.join(url)
        is_known = found.scheme in ("http", "https") and bool(found.host) and not found.userinfo
        is_known = is_known and (found.port is None or 0 < found.port < 2**16)
    except (ValueError, httpx.InvalidURL):
        is_known = False
    if not is_known:
        wrong = "A URL must begin with http:// or https://, and have no user name or password."
        wrong = wrong if base is None else f"The URL redirects to one that is not valid. {wrong}"
        raise RequestError(wrong, code="invalid_url", param=param)
    return found


def _pinned(url: httpx.URL, address: str, **options: Any) -> httpx.Request:
    """Return a request for a URL that connects to an address which was checked."""
    # The name still goes into the request, and into the check of the certificate.
    headers = {"Host": url.netloc.decode(), "User-Agent": "videollm-mod", "Accept": "*/*"}
    headers |= {"Accept-Encoding": "identity"}
    extensions = {"sni_hostname": url.raw_host.decode().rstrip("."), **options}
    return httpx.Request("GET", url.copy_with(host=address), headers=headers, extensions=extensions)


async def _save(response: httpx.Response, file: BinaryIO, most_bytes: int, param: str | None) -> None:
    packed = response.headers.get("content-encoding", "identity")
    if packed != "identity":
        # A few bytes could unpack to gigabytes. The request asked for the file as it is.
        wrong = f"The URL answers with a packed file (Content-Encoding {packed!r}), which this server does not unpack."
        raise RequestError(wrong, code="unreachable_url", param=param)
    count = 0
    async for chunk in response.aiter_raw():
        count += len(chunk)
        if count > most_bytes:
            wrong = f"The URL has more than {most_bytes} bytes, which is the limit."
            raise RequestError(wrong, status=413, code="file_too_large", param=param)
        file.write(chunk)


__all__ = ["fetch", "is_public", "read_data_uri", "read_picture"]
