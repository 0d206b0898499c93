"""Run on a host: waits until somebody is named under a key of the BitTorrent DHT.

`python dht_find.py HOST:PORT KEY_HEX` enters the DHT at that node, asks every second, and prints the endpoints that it first got as
one JSON list of [address, port].
"""

from __future__ import annotations

import json
import sys
import time

import libtorrent as lt

_WITHIN_S = 90.0
_AGAIN_S = 1.0


def main(entry: str, key: str) -> int:
    host, _, port = entry.rpartition(":")
    session = lt.session(
        {
            "listen_interfaces": "0.0.0.0:0",
            "dht_bootstrap_nodes": entry,
            "enable_lsd": False,
            "enable_upnp": False,
            "enable_natpmp": False,
            "alert_mask": int(lt.alert.category_t.dht_operation_notification),
        }
    )
    session.add_dht_node((host, int(port)))
    end = time.monotonic() + _WITHIN_S
    while time.monotonic() < end:
        session.dht_get_peers(lt.sha1_hash(bytes.fromhex(key)))
        session.wait_for_alert(int(_AGAIN_S * 1000))
        for alert in session.pop_alerts():
            if isinstance(alert, lt.dht_get_peers_reply_alert) and alert.peers():
                print(json.dumps(alert.peers()), flush=True)
                return 0
    return 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
