#!/bin/sh
# Every file of /run/secrets becomes a variable of this process, under the file's name: `docker inspect` shows none.
set -eu
for file in /run/secrets/*; do
    [ -f "$file" ] || continue
    name=${file##*/}
    value=$(cat "$file")
    if [ -n "$value" ]; then
        export "$name=$value"
    else
        case $name in
        KAGGLE_API_TOKEN | HF_TOKEN) ;; # not everybody has an account there
        *)
            echo "the secret $name is empty: write it to the file of that name in secrets/, or \`make secrets\`" >&2
            exit 2
            ;;
        esac
    fi
done
exec "$@"
