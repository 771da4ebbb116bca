-- A2A messages of 1 KB, each with an id of its own; TOKEN, METHOD, and the workspaces w0 … w(WORKSPACES - 1).
local text = string.rep("x", 760)
local head = '{"jsonrpc":"2.0","id":1,"method":"' .. os.getenv("METHOD") .. '","params":{"message":{"kind":"message","role":"user","messageId":"'
local tail = '","parts":[{"kind":"text","text":"' .. text .. '"}]}}}'
local run = os.getenv("RUN")
local count = tonumber(os.getenv("WORKSPACES"))
local path = os.getenv("PATHS")
local number = 0
wrk.method = "POST"
wrk.headers["Content-Type"] = "application/json"
wrk.headers["Authorization"] = "Bearer " .. os.getenv("TOKEN")
wrk.headers["X-Workspace-ID"] = "lead"

function request()
  number = number + 1
  local where = string.gsub(path, "%%", tostring(number % count))
  return wrk.format(nil, where, nil, head .. run .. "-" .. number .. tail)
end
