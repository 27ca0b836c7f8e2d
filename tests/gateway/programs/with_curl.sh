#!/bin/sh
# Score with curl: with_curl.sh PNG KEY CERTIFICATE URL...
set -eu
file=$1 key=$2 certificate=$3
shift 3
send() { curl --silent --show-error --cacert "$certificate" --header "X-API-Key: $key" --write-out '\n' "$@"; }
for url; do
    send --header 'Content-Type: image/png' --data-binary "@$file" "$url/score"
    send --form alpha=0.05 --form "file=@$file" "$url/score"
    send --form "files=@$file" --form "files=@$file;type=image/png" "$url/score/batch"
done
