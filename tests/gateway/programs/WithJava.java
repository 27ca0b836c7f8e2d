import java.io.ByteArrayInputStream;
import java.io.ByteArrayOutputStream;
import java.io.IOException;
import java.net.HttpURLConnection;
import java.net.URI;
import java.net.URL;
import java.net.http.HttpClient;
import java.net.http.HttpRequest;
import java.net.http.HttpResponse;
import java.nio.charset.StandardCharsets;
import java.nio.file.Files;
import java.nio.file.Path;
import java.security.KeyStore;
import java.security.cert.CertificateFactory;
import java.util.Arrays;
import javax.net.ssl.HttpsURLConnection;
import javax.net.ssl.SSLContext;
import javax.net.ssl.TrustManagerFactory;

/** Score with both clients of the JDK: java WithJava.java PNG KEY CERTIFICATE URL... */
public class WithJava {
    private static final String BOUNDARY = "----JavaBoundary7MA4YWxkTrZu0gW";

    public static void main(String[] arguments) throws Exception {
        byte[] png = Files.readAllBytes(Path.of(arguments[0]));
        String key = arguments[1];
        SSLContext context = trusting(Path.of(arguments[2]));
        HttpsURLConnection.setDefaultSSLSocketFactory(context.getSocketFactory());
        HttpClient client = HttpClient.newBuilder().sslContext(context).build();
        byte[] one = form(png, "file", 1, "Content-Disposition: form-data; name=\"alpha\"\r\n"
                + "Content-Type: text/plain; charset=UTF-8\r\nContent-Transfer-Encoding: 8bit\r\n\r\n0.05\r\n");
        byte[] two = form(png, "files", 2, "");
        String multipart = "multipart/form-data; boundary=" + BOUNDARY;
        for (String url : Arrays.copyOfRange(arguments, 3, arguments.length)) {
            System.out.println(connect(url + "/score", key, "image/png", png, false));
            System.out.println(connect(url + "/score", key, multipart, one, true));
            System.out.println(connect(url + "/score/batch", key, multipart, two, false));
            System.out.println(send(client, url + "/score", key, "image/png", png));
            System.out.println(send(client, url + "/score", key, multipart, one));
            System.out.println(send(client, url + "/score/batch", key, multipart, two));
        }
    }

    private static String connect(String url, String key, String type, byte[] body, boolean chunked)
            throws IOException {
        HttpURLConnection connection = (HttpURLConnection) new URL(url).openConnection();
        connection.setDoOutput(true);
        connection.setRequestProperty("Content-Type", type);
        connection.setRequestProperty("X-API-Key", key);
        if (chunked) {
            connection.setChunkedStreamingMode(0);
        }
        connection.getOutputStream().write(body);
        connection.getOutputStream().close();
        return new String(connection.getInputStream().readAllBytes(), StandardCharsets.UTF_8);
    }

    private static String send(HttpClient client, String url, String key, String type, byte[] body)
            throws IOException, InterruptedException {
        HttpRequest request = HttpRequest.newBuilder(URI.create(url))
                .header("Content-Type", type)
                .header("X-API-Key", key)
                .POST(HttpRequest.BodyPublishers.ofByteArray(body))
                .build();
        return client.send(request, HttpResponse.BodyHandlers.ofString()).body();
    }

    private static byte[] form(byte[] png, String field, int files, String parameter) throws IOException {
        ByteArrayOutputStream body = new ByteArrayOutputStream();
        if (!parameter.isEmpty()) {
            body.write(("--" + BOUNDARY + "\r\n" + parameter).getBytes(StandardCharsets.UTF_8));
        }
        for (int number = 0; number < files; number++) {
            body.write(("--" + BOUNDARY + "\r\nContent-Disposition: form-data; name=\"" + field
                    + "\"; filename=\"zero.png\"\r\nContent-Type: image/png\r\n"
                    + "Content-Transfer-Encoding: binary\r\n\r\n").getBytes(StandardCharsets.UTF_8));
            body.write(png);
            body.write("\r\n".getBytes(StandardCharsets.UTF_8));
        }
        body.write(("--" + BOUNDARY + "--\r\n").getBytes(StandardCharsets.UTF_8));
        return body.toByteArray();
    }

    private static SSLContext trusting(Path certificate) throws Exception {
        KeyStore store = KeyStore.getInstance(KeyStore.getDefaultType());
        store.load(null);
        byte[] content = Files.readAllBytes(certificate);
        store.setCertificateEntry("gateway", CertificateFactory.getInstance("X.509")
                .generateCertificate(new ByteArrayInputStream(content)));
        TrustManagerFactory managers = TrustManagerFactory.getInstance(TrustManagerFactory.getDefaultAlgorithm());
        managers.init(store);
        SSLContext context = SSLContext.getInstance("TLS");
        context.init(null, managers.getTrustManagers(), null);
        return context;
    }
}
