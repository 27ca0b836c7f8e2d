// Score with axios: with_axios.mjs PNG KEY CERTIFICATE URL...
// Node.js reads the certificate from NODE_EXTRA_CA_CERTS.
import { readFileSync } from 'node:fs';
import axios from 'axios';

const [file, key, , ...urls] = process.argv.slice(2);
const png = readFileSync(file);
const client = axios.create({ headers: { 'X-API-Key': key }, proxy: false });
const show = (reply) => console.log(JSON.stringify(reply.data));
for (const url of urls) {
  show(await client.post(`${url}/score`, png, { headers: { 'Content-Type': 'image/png' } }));
  // axios gives a part from a buffer no file name.
  show(await client.postForm(`${url}/score`, { alpha: 0.05, file: png }));
  const batch = new FormData();
  batch.append('files', new Blob([png]), 'a.png');
  batch.append('files', new Blob([png]), 'b.png');
  show(await client.post(`${url}/score/batch`, batch));
}
