"""BitTorrent: what a torrent is (`metainfo`, pure) and the session that speaks it (`session`). Nobody else imports libtorrent."""
