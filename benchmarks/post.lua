-- POSTs each body of the folder BODIES in turn, or GETs without any; written for wrk.
local requests, count = {}, tonumber(os.getenv("COUNT"))
local path, form = os.getenv("TARGET"), os.getenv("FORM")
if form == "get" then
  count = 0
  requests[1] = wrk.format("GET", path)
end
local boundary = "benchmark7MA4YWxkTrZu0gW"
for i = 0, count - 1 do
  local file = io.open(os.getenv("BODIES") .. "/" .. i .. ".png", "rb")
  local body, kind = file:read("*a"), "image/png"
  file:close()
  if form == "multipart" then
    kind = "multipart/form-data; boundary=" .. boundary
    body = "--" .. boundary .. '\r\nContent-Disposition: form-data; name="file"; filename="image.png"\r\n'
      .. "Content-Type: image/png\r\n\r\n" .. body .. "\r\n--" .. boundary .. "--\r\n"
  end
  requests[#requests + 1] = wrk.format("POST", path, { ["content-type"] = kind }, body)
end
local turn = 0
request = function()
  turn = turn % #requests + 1
  return requests[turn]
end
done = function(summary, latency, _)
  local e = summary.errors
  io.write(string.format('RESULT {"requests":%d,"seconds":%f,"p50_ms":%f,"p99_ms":%f,"max_ms":%f,"failed":%d}\n',
    summary.requests, summary.duration / 1e6, latency:percentile(50) / 1e3, latency:percentile(99) / 1e3,
    latency.max / 1e3, e.connect + e.read + e.write + e.status + e.timeout))
end
