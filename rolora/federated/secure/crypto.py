"""What the protocol rests on, all of it from `cryptography`: X25519, HKDF-SHA256,
ChaCha20-Poly1305 for what clients seal for each other, ChaCha20 for masks.

Every key is of one round and one attempt and is used for one purpose, which goes into the
derivation; so a nonce of zeros is never used twice with one key.
"""

from __future__ import annotations

import hashlib

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from torch import Tensor

TAG = 16  # bytes that sealing adds
_CHUNK = 1 << 20  # values of a mask made at a time


def new_key() -> bytes:
    """A private key, 32 bytes of the operating system's generator."""
    return X25519PrivateKey.generate().private_bytes_raw()


def public_of(private: bytes) -> bytes:
    return X25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()


def agreed(private: bytes, public: bytes, purpose: str) -> bytes:
    """32 bytes that the owners of two keys, and nobody else, can compute.

    Raises ValueError for a public key that agrees with every private one.
    """
    secret = X25519PrivateKey.from_private_bytes(private).exchange(
        X25519PublicKey.from_public_bytes(public)
    )
    return HKDF(hashes.SHA256(), 32, None, purpose.encode()).derive(secret)


def commitment(seed: bytes) -> bytes:
    """32 bytes that tell a seed of 32 random bytes from another, and nothing of it."""
    return hashlib.sha256(b"rolora seed" + seed).digest()


def seal(key: bytes, text: bytes) -> bytes:
    return ChaCha20Poly1305(key).encrypt(bytes(12), text, None)


def opened(key: bytes, sealed: bytes) -> bytes | None:
    """What was sealed with `key`; None for anything else."""
    try:
        return ChaCha20Poly1305(key).decrypt(bytes(12), sealed, None)
    except InvalidTag:
        return None


def add_mask(total: Tensor, seed: bytes, sign: int) -> None:
    """`total += sign · mask(seed)` modulo 2**64, `total` int64 `[n]` on the CPU."""
    stream = Cipher(algorithms.ChaCha20(seed, bytes(16)), None).encryptor()
    add = np.add if sign > 0 else np.subtract  # which wrap, and take the words where they lie
    for part in total.split(_CHUNK):
        words = np.frombuffer(stream.update(bytes(8 * len(part))), dtype="<i8")
        add(part.numpy(), words, out=part.numpy())
