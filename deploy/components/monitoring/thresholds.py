"""Thresholds of the alerts, and objectives. This is the only place where they are written.

The alerts (alerts.py) compare with them, and the dashboard (dashboard.py) draws them as red lines.
After a change, write both files again: docs/monitoring.md has the commands.
"""

from __future__ import annotations

# Objective: this part of all changes reaches the subscribers within FRESH_SECONDS. FRESH_SECONDS
# must be an upper bound of a bucket of ps_freshness_seconds; see docs/metrics.md.
FRESH_SECONDS = 1.0
FRESH_PART = 0.99
FRESH_CHANGES = 100  # a shard with at most so many changes in the long window causes no alert
# How often the permitted part of late changes (1 - FRESH_PART) may be used up, as (burn rate, long
# window, short window): an alert fires if both windows exceed the rate. 14.4 for an hour is 2 % of
# what is permitted in 30 days, 6 for six hours is 5 %.
FAST_BURN = (14.4, "1h", "5m")
SLOW_BURN = (6.0, "6h", "30m")

# How long a shard may be away. A rolling update must not exceed it: Kubernetes detaches the volume,
# attaches it on the next node, pulls the image and starts the pod.
DOWN = "3m"
FSYNC_SECONDS = 0.25  # 99th percentile of the syncs of the log to disk
DISK_FREE = 0.1  # part of the disk that must be free
MEMORY_HEADROOM = 0.1  # part of the memory limit that must be free
SUBSCRIBER_LAG_SECONDS = 60  # age of the oldest change that a subscriber has not received
FLUSH_SECONDS = 900  # age of the last flush
CHECKPOINT_SECONDS = 86_400  # age of the last checkpoint, while rows change
CERTIFICATE_DAYS = 14  # days until a certificate expires
OVERLOADED_PER_SECOND = 1  # refused requests per second and shard
SLOW_FACTOR = 4  # a shard is slow if its requests take so many times as long as on most shards
SLOW_SECONDS = 0.01  # and longer than this, 99th percentile
