// Read a JSON array of custom resources from standard input and print each fault on a line.
//
// The validators ignore fields that they do not know, and an API server drops them. So a proxy records which fields a
// validator reads: a field that it never read is unknown.
import { readFileSync } from "node:fs";
import * as gateway from "@kubernetes-models/gateway-api/gateway.networking.k8s.io/v1";
import * as keda from "@kubernetes-models/keda/keda.sh/v1alpha1";
import * as monitoring from "@kubernetes-models/prometheus-operator/monitoring.coreos.com/v1";

const kinds = {
  "gateway.networking.k8s.io/v1": gateway,
  "keda.sh/v1alpha1": keda,
  "monitoring.coreos.com/v1": monitoring,
};

function recorded(value, path, read) {
  return new Proxy(value, {
    get(target, key) {
      const found = target[key];
      if (typeof key !== "string" || !Object.hasOwn(target, key)) return found;
      read.add(`${path}/${key}`);
      return found !== null && typeof found === "object" ? recorded(found, `${path}/${key}`, read) : found;
    },
  });
}

function* unread(value, path, read) {
  for (const [key, below] of Object.entries(value)) {
    if (!read.has(`${path}/${key}`)) yield `${path}/${key} is unknown`;
    else if (below !== null && typeof below === "object") yield* unread(below, `${path}/${key}`, read);
  }
}

for (const resource of JSON.parse(readFileSync(0, "utf8"))) {
  const name = `${resource.kind} ${resource.metadata?.name}`;
  const model = kinds[resource.apiVersion]?.[resource.kind];
  if (model === undefined) {
    console.log(`${name}: no schema for ${resource.apiVersion}`);
    continue;
  }
  const read = new Set();
  try {
    model.prototype.validate.call(recorded(resource, "", read));
  } catch (error) {
    console.log(`${name}: ${error.message}`);
  }
  for (const fault of unread(resource, "", read)) console.log(`${name}: ${fault}`);
}
