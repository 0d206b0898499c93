"""BitTorrent: what a torrent is (`metainfo`, pure) and the session that speaks it (`session`, the only importer of libtorrent)."""
